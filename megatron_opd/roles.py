"""The composition root: what each role is made of, and the loop in which it answers the controller.

The only file that names the concrete learner, rollout and teacher. Each guest is imported by the role that needs it.
"""

import asyncio
import shutil
import signal
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from megatron_opd.config import Config
from megatron_opd.data.prompts import load_tokenizer
from megatron_opd.errors import CheckpointError, UnsavedError, WeightSyncError
from megatron_opd.interfaces import RolloutBackend, TeacherBackend
from megatron_opd.placement import Process
from megatron_opd.preflight import build_estimator, check, load_heldout, load_hf_config, needs_of
from megatron_opd.runtime import report, rpc, whole
from megatron_opd.runtime.collective import Ranks
from megatron_opd.runtime.imports import load_object
from megatron_opd.runtime.nvtx import mark_operations
from megatron_opd.turns import Desks, Turns, serve
from megatron_opd.types import (
    Address,
    Done,
    Export,
    FinishCheckpoint,
    Generate,
    HostTransport,
    JoinTransport,
    LoadCheckpoint,
    Needs,
    ReceiveWeights,
    Rollout,
    RunSummary,
    SaveCheckpoint,
    Saved,
    Score,
    SendWeights,
    Stop,
    Train,
)
from megatron_opd.weights.files import write_folder
from megatron_opd.weights.transport import BroadcastSender

if TYPE_CHECKING:
    import torch

    from megatron_opd.controller import Roles
    from megatron_opd.learner.learner import Learner
    from megatron_opd.rollout.engine import EngineSettings


T = TypeVar("T")
D = TypeVar("D", rpc.Desk, rpc.AsyncDesk)
Requests = list[tuple[bytes, object]]  # (request number, message)
Handler = Callable[[object], list[object]]  # one answer for each request in the group
Batches = Callable[[Requests], Iterable[tuple[list[bytes], object]]]  # groups requests into one message each


def run_role(config: Config, process: Process) -> None:
    """Runs one role process until the controller stops it."""
    roles: dict[str, Callable[[Config, Process], None]] = {
        "controller": _controller,
        "learner": _learner,
        "rollout": lambda config, process: asyncio.run(_rollout(config, process)),
        "teacher": _teacher,
        "evaluate": _evaluate,
    }
    if process.role != "controller":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # where a scheduler signals every process, the controller alone decides
    roles[process.role](config, process)


def _controller(config: Config, process: Process) -> None:
    asyncio.run(_control(config))


async def _control(config: Config) -> None:
    from megatron_opd.controller import Controller
    from megatron_opd.data.faults import Limits
    from megatron_opd.data.prompts import PromptSource
    from megatron_opd.metrics import StepLog
    from megatron_opd.recovery import Recovery

    folder = Path(config.run.dir)
    replaced = config.restarts > 0 and report.has_launcher()
    ask = partial(_ask_for_replacement, learner=config.replaces_learner)
    silent_s, on_loss = config.supervision.silent_s, ask if replaced else None
    async with rpc.Hub(folder / "keys", config.run.host, config.run.port, silent_s=silent_s, on_loss=on_loss) as hub:
        asked = asyncio.Event()
        for number in (signal.SIGUSR1,) if report.has_launcher() else (signal.SIGUSR1, signal.SIGTERM):  # a launcher's SIGTERM is an end
            asyncio.get_running_loop().add_signal_handler(number, asked.set)
        rpc.publish_address(folder / "controller.json", hub.address)
        checked = await asyncio.to_thread(check, config)
        recovery = await asyncio.to_thread(Recovery, config, folder, hurried=asked.is_set)
        roles = await _assemble(config, hub, replaced=replaced)
        log = StepLog(folder, version=recovery.before.version, size=recovery.before.metrics_bytes)
        prompts = PromptSource(checked.records, seed=config.run.seed, shuffle=config.data.shuffle)
        limits = Limits(vocab_size=load_hf_config(config.student.path).vocab_size, response_tokens=config.rollout.max_response_tokens)
        controller = Controller(config, prompts, roles, log, recovery, limits)
        summary = await controller.run(str(folder / "hf"), asked)
        if summary is not None:
            await recovery.when_there_is_room(lambda: _write(folder / "summary.json", summary))
        log.close()
        recovery.close()
        await controller.stop()
        (folder / "controller.json").unlink()  # who comes now, in the place of a lost replica, comes too late


async def _assemble(config: Config, hub: rpc.Hub, *, replaced: bool) -> "Roles":
    """Waits for all roles."""
    from megatron_opd.controller import Roles
    from megatron_opd.fleet import Fleet, Samplers, Seat

    needs, wait_s = build_estimator(config).needs, config.run.start_timeout_s
    await hub.peers("learner", 1, wait_s)
    rollouts = teachers = None
    patience_s = 2 * wait_s + config.supervision.backoff_s * 2**config.restarts if replaced else 0.0
    learner = Seat(hub, "learner", replaced_within_s=patience_s if config.replaces_learner else 0.0)
    if needs.generation:
        await hub.peers("rollout", config.rollout.replicas, wait_s)
        width, timeout_s = config.rollout.tensor_parallel, config.run.peer_timeout_s
        beside_s = 0.0 if config.run.colocated else patience_s  # a rollout in the learner's processes shares their end
        rollouts = Samplers(hub, learner, width=width, timeout_s=timeout_s, replaced_within_s=beside_s)
    if needs.teacher:
        await hub.peers("teacher", config.teacher.replicas, wait_s)
        teachers = Fleet(hub, "teacher", replaced_within_s=patience_s)
    return Roles(hub=hub, learner=learner, rollouts=rollouts, teachers=teachers)


def _ask_for_replacement(peer: rpc.Peer, *, learner: bool) -> None:
    here = peer.hello.host == socket.gethostname()  # a launcher knows its own machine's process ids
    if here and (learner or peer.hello.role != "learner"):
        report.ask_for_replacement(peer.hello.pid, peer.lost)


def _ranks(config: Config, process: Process) -> Ranks:
    return Ranks.connect(
        file=Path(config.run.dir) / "rendezvous" / f"{process.role}-{process.replica}.json",
        rank=process.rank,
        world_size=process.world_size,
        host=config.run.host,
        device=config.run.device,
        timeout_s=config.run.peer_timeout_s,
    )


def _open(kind: type[D], config: Config, process: Process) -> D:
    folder = Path(config.run.dir)
    address = rpc.await_address(folder / "controller.json", config.run.start_timeout_s)
    return kind(folder / "keys", address, rpc.hello(process.role, process.replica), silent_s=config.supervision.silent_s)


def _learner(config: Config, process: Process) -> None:
    from megatron_opd.learner.learner import Learner, StudentModel, TeacherHead

    if config.run.device == "cuda":
        mark_operations()
    ranks = _ranks(config, process)
    if config.run.colocated and needs_of(config).generation:
        from megatron_opd.rollout.inprocess import InProcessRollout

        rollout = InProcessRollout(_engine_settings(config), rank=process.rank)
        rollout.sleep()  # the learner is built with the device to itself
    else:
        rollout = None
    given = config.teacher if config.teacher.backend != "none" else None
    student = StudentModel(
        path=config.student.path,
        hf_config=load_hf_config(config.student.path),
        steps=config.loop.steps,
        seed=config.run.seed,
        device=config.run.device,
        teacher=TeacherHead(path=given.path, hf_config=load_hf_config(given.path), dtype=given.dtype) if given else None,
        teacher_moments=needs_of(config).moments,
    )
    learner = Learner(student, config.learner, build_estimator(config), ranks)
    handler = LearnerHandler(config, learner, ranks)
    if rollout is not None:
        roles = [replace(process, role=role, replica=0) for role in ("learner", "rollout")]
        desks = Desks([_open(rpc.Desk, config, role) for role in roles]) if process.rank == 0 else None
        serve(desks, Turns(learner, rollout, handler, ranks, dtype=config.rollout.dtype), ranks)
        return
    desk = _open(rpc.Desk, config, process) if process.rank == 0 else None
    _serve(desk, ranks, handler, _one_by_one)


class LearnerHandler:
    """Answers requests to the learner; every rank runs it in lockstep, the first rank's answer counts."""

    def __init__(self, config: Config, learner: "Learner", ranks: Ranks) -> None:
        self._config = config
        self._learner = learner
        self._ranks = ranks
        self._first = ranks.rank == 0
        self._sender = BroadcastSender(
            host=config.run.host,
            device=config.run.device,
            bucket_bytes=config.learner.bucket_bytes,
            timeout_s=config.run.peer_timeout_s,
            delta=config.learner.weight_delta,
        )

    def __call__(self, message: object) -> list[object]:
        """The answer, alone in a list."""
        match message:
            case Train(trajectories=trajectories):
                return [self._learner.train(trajectories)]
            case HostTransport(receivers=receivers):
                return [self._listen(receivers)]
            case SendWeights(version=version):
                assert version == self._learner.version, f"asked to send version {version}, have {self._learner.version}"
                return [Done(seconds=self._send(version))]
            case SaveCheckpoint(path=path):
                self._learner.save(path)
                return [Done()]
            case FinishCheckpoint():
                try:
                    self._learner.finish_save()
                except UnsavedError as error:
                    return [Saved(fault=str(error))]
                return [Saved()]
            case LoadCheckpoint(path=path, version=version):
                self._learner.load(path)
                if self._learner.version != version:
                    raise CheckpointError(f"{path} holds step {self._learner.version}, wanted {version}")
                return [Done()]
            case Export(path=path):
                if self._first and Path(path).exists():  # an earlier process of this run wrote it
                    shutil.rmtree(path)
                dtype, source = self._config.learner.dtype, self._config.student.path
                manifest, weights = self._learner.manifest(dtype), self._learner.weights(dtype)
                self._give(weights, self._first, lambda weights: write_folder(path, manifest, weights, source=source))
                return [Done()]
            case Stop():
                self._sender.close()
                return [Done()]
        raise AssertionError(f"a learner is not asked for {message!r:.80}")

    def _listen(self, receivers: int) -> Address:
        """Opens a rendezvous on the first rank of each pipeline stage, and returns that of the first stage, which knows the others."""
        mine = self._sender.listen(receivers) if self._learner.stage is not None else None
        found = self._ranks.gather(msgspec.msgpack.encode(mine))
        first, *others = filter(None, (msgspec.msgpack.decode(data, type=Address | None) for data in found))
        if self._first:
            self._sender.name_others(others)
        return first

    def _send(self, version: int) -> dict[str, float]:
        """Every pipeline stage sends its own, all at once; the seconds of the slowest.

        Raises:
            WeightSyncError: on every rank, if one of them failed.
        """
        dtype, manifest = self._config.rollout.dtype, self._learner.stage_manifest(self._config.rollout.dtype)
        tensors, sends = self._learner.stage_weights(dtype), self._learner.stage is not None
        seconds, failure = {}, ""
        try:
            seconds = self._give(tensors, sends, lambda taken: self._sender.send(version, manifest, taken)) or {}
        except WeightSyncError as error:
            failure = str(error)
        found = [msgspec.msgpack.decode(data) for data in self._ranks.gather(msgspec.msgpack.encode((seconds, failure)))]
        if failures := [failure for _, failure in found if failure]:
            self._sender.close()
            raise WeightSyncError("; ".join(failures))
        return max((seconds for seconds, _ in found), key=lambda parts: sum(parts.values()))

    def _give(
        self, tensors: Iterator[tuple[str, "torch.Tensor"]], takes: bool, take: Callable[[Iterator[tuple[str, "torch.Tensor"]]], T]
    ) -> T | None:
        """Lets the ranks that shall take the full tensors that all ranks produce together."""
        if takes:
            try:
                return take(tensors)
            finally:
                for _ in tensors:  # the others take part to the end, whatever became of the taker
                    continue
        for name, _ in tensors:
            raise AssertionError(f"this rank only takes part, and received {name}")
        return None


def _serve(desk: rpc.Desk | None, ranks: Ranks | None, handle: Handler, batches: Batches, gather_s: float = 0.0) -> None:
    """The first rank takes requests and groups them; all ranks handle each group; the first rank answers."""
    if desk is not None:
        desk.greet()
    report.report_ready()
    while True:
        for numbers, request in batches(desk.receive(gather_s)) if desk is not None else [([], None)]:
            if ranks is not None:
                request = ranks.share(request)
            try:
                answers = handle(request)
            except WeightSyncError as error:  # a receiver was lost: the learner is whole, and can send to others
                if desk is not None:
                    desk.fail(numbers[0], str(error), setback=True)
                continue
            except Exception as error:
                if desk is not None:
                    desk.fail(numbers[0], f"{type(error).__name__}: {error}")
                raise
            if desk is not None:
                for number, answer in zip(numbers, answers, strict=True):
                    desk.answer(number, answer)
            if isinstance(request, Stop):
                if ranks is not None:
                    ranks.close()
                if desk is not None:
                    desk.close()
                return


def _one_by_one(requests: Requests) -> Iterator[tuple[list[bytes], object]]:
    for number, message in requests:
        yield [number], message


def _by_tokens(limit: int) -> Batches:
    """Scores together what fits `limit` tokens, in order of arrival; packing leaves no padding to sort away."""

    def batches(requests: Requests) -> Iterator[tuple[list[bytes], object]]:
        numbers: list[bytes] = []
        rollouts: list[Rollout] = []
        for number, message in requests:
            if not isinstance(message, Score):
                yield [number], message
                continue
            tokens = sum(len(r.prompt_ids) + len(r.response_ids) for r in (*rollouts, *message.rollouts))
            if rollouts and tokens > limit:
                yield numbers, Score(rollouts=tuple(rollouts))
                numbers, rollouts = [], []
            numbers.append(number)
            rollouts += message.rollouts
        if rollouts:
            yield numbers, Score(rollouts=tuple(rollouts))

    return batches


def _engine_settings(config: Config) -> "EngineSettings":
    from megatron_opd.rollout.engine import EngineSettings

    return EngineSettings(
        rollout=config.rollout,
        path=config.student.path,
        needs=needs_of(config),
        max_model_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        device=config.run.device,
        seed=config.run.seed,
        timeout_s=config.run.peer_timeout_s,
    )


async def _rollout(config: Config, process: Process) -> None:
    from megatron_opd.rollout.engine import VLLMRollout

    backend: RolloutBackend = await VLLMRollout.start(_engine_settings(config))
    desk = _open(rpc.AsyncDesk, config, process)
    await desk.greet()
    report.report_ready()

    async def handle(message: object) -> object:
        match message:
            case Generate(prompt=prompt):
                return await backend.generate(prompt)
            case JoinTransport():
                await backend.join_transport(message)
                return Done()
            case ReceiveWeights(version=version):
                return Done(seconds=await backend.receive_weights(version))
        raise AssertionError(f"a rollout is not asked for {message!r:.80}")

    async def answer(number: bytes, message: object) -> None:
        try:
            await desk.answer(number, await handle(message))
        except WeightSyncError as error:  # the old weights are whole and live: the next attempt may succeed
            await desk.fail(number, str(error), setback=True)
        except Exception as error:
            await desk.fail(number, f"{type(error).__name__}: {error}")
            raise

    answers: set[asyncio.Task] = set()
    async with asyncio.TaskGroup() as tasks:
        async for number, message in desk.requests():
            if isinstance(message, Stop):
                for task in answers:  # nobody waits for these any more
                    task.cancel()
                await backend.close()
                await desk.answer(number, Done())
                desk.close()
                return
            answers.add(task := tasks.create_task(answer(number, message)))
            task.add_done_callback(answers.discard)


def _teacher(config: Config, process: Process) -> None:
    needs = needs_of(config)
    ranks = _ranks(config, process) if config.teacher.backend == "megatron" else None  # vLLM makes its own
    if ranks is not None:
        from megatron_opd.teacher.megatron import MegatronTeacher, TeacherModel

        model = TeacherModel(
            hf_config=load_hf_config(config.teacher.path),
            vocab_size=load_hf_config(config.student.path).vocab_size,
            device=config.run.device,
            seed=config.run.seed,
        )
        teacher: TeacherBackend = MegatronTeacher(model, config.teacher, needs, ranks)
    else:
        from megatron_opd.teacher.vllm import VLLMTeacher

        teacher = VLLMTeacher(
            config.teacher,
            needs=needs,
            max_model_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            device=config.run.device,
            seed=config.run.seed,
        )

    def handle(message: object) -> list[object]:
        if isinstance(message, Score):
            return list(teacher.score(message.rollouts))
        teacher.close()
        return [Done()]

    desk = _open(rpc.Desk, config, process) if process.rank == 0 else None
    _serve(desk, ranks, handle, _by_tokens(config.teacher.batch_tokens), config.teacher.gather_s)


def _evaluate(config: Config, process: Process) -> None:
    """Completes `summary.json` with the student before and after, and the teacher, on the held-out prompts."""
    from megatron_opd.rollout.evaluate import EvalModel, EvalReport, EvalSettings, evaluate
    from megatron_opd.teacher.vllm import VLLMTeacher

    file = Path(config.run.dir) / "summary.json"
    summary = msgspec.json.decode(file.read_bytes(), type=RunSummary)
    length = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    settings = EvalSettings(
        max_response_tokens=config.rollout.max_response_tokens,
        max_model_len=length,
        dtype=config.eval.dtype,
        max_running=config.rollout.max_running,
        device=config.run.device,
        seed=config.run.seed,
    )
    student = partial(EvalModel, tensor_parallel=config.rollout.tensor_parallel, kv_cache_bytes=config.rollout.kv_cache_bytes)
    models = {"before": student(path=config.student.path), "after": student(path=summary.hf_export)}
    verifier = load_object(config.eval.verifier, "eval.verifier") if config.eval.verifier else None
    scorer, given = None, config.teacher
    if given.backend != "none":
        needs = Needs(teacher_token=True)
        scorer = partial(VLLMTeacher, replace(given, dtype=config.eval.dtype), needs=needs, max_model_len=length, device=config.run.device)
        if verifier is not None:
            width, memory = given.tensor_parallel, given.kv_cache_bytes
            models["teacher"] = EvalModel(path=given.path, tensor_parallel=width, kv_cache_bytes=memory, sampled=False)
    heldout = load_heldout(config, load_tokenizer(config.student.path))
    wanted = {name: model for name, model in models.items() if name in config.eval.models}
    found = defaultdict(EvalReport, evaluate(wanted, heldout, settings, verifier=verifier, teacher=scorer))
    summary = replace(
        summary,
        accuracy_before=found["before"].score,
        accuracy_after=found["after"].score,
        teacher_accuracy=found["teacher"].score,
        kl_before=found["before"].kl,
        kl_after=found["after"].kl,
    )
    _write(file, summary)


def _write(file: Path, summary: RunSummary) -> None:
    whole.write(file, msgspec.json.format(msgspec.json.encode(summary), indent=1))
