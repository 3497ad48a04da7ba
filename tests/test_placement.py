import dataclasses

import pytest
from omegaconf import OmegaConf

from megatron_opd import config as configs
from megatron_opd import placement
from megatron_opd.errors import ConfigError
from megatron_opd.placement import Resources, cluster_resources, place

BASE = {"student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"prompts": "p"}}


def config(**sections):
    return configs.resolve(OmegaConf.merge(BASE, sections))


def spots(processes, role):
    return [(p.node, p.devices) for p in processes if p.role == role]


def test_gpus_are_dealt_to_learner_rollouts_teachers_and_no_process_straddles_nodes():
    made = config(
        run={"device": "cuda"},
        learner={"tensor_parallel": 2, "data_parallel": 3},
        rollout={"replicas": 2, "tensor_parallel": 4},
        teacher={"tensor_parallel": 2},
        cluster={"nodes": 2},
    )
    found = place(made, cluster_resources(made), generation=True)
    assert spots(found, "controller") == [(0, ())]
    assert spots(found, "learner") == [(0, (gpu,)) for gpu in range(6)]
    assert spots(found, "rollout") == [(1, (0, 1, 2, 3)), (1, (4, 5, 6, 7))], "two GPUs of node 0 are too few for a replica"
    assert spots(found, "teacher") == [(0, (6,)), (0, (7,))]
    dealt = [(p.node, gpu) for p in found for gpu in p.devices]
    assert len(dealt) == len(set(dealt)) == 16
    assert [p.rank for p in found if p.role == "learner"] == list(range(6))


def test_roles_keep_to_their_nodes_in_the_order_given():
    made = config(
        run={"device": "cuda"},
        learner={"data_parallel": 4},
        cluster={"nodes": 3, "gpus_per_node": 2, "learner": [2, 1], "rollout": [0], "teacher": [0]},
    )
    found = place(made, cluster_resources(made), generation=True)
    assert spots(found, "learner") == [(2, (0,)), (2, (1,)), (1, (0,)), (1, (1,))]
    assert spots(found, "rollout") == [(0, (0,))] and spots(found, "teacher") == [(0, (1,))]


def test_counted_cores_are_dealt_and_pinned_unless_the_role_names_its_own():
    made = config(
        rollout={"replicas": 2, "tensor_parallel": 2}, teacher={"cores": [5]}, cluster={"nodes": 2, "cores_per_node": 4, "rollout": [1]}
    )
    found = place(made, cluster_resources(made), generation=True)
    assert [(p.name, p.node, p.cores) for p in found[1:]] == [
        ("learner-0", 0, (0,)),
        ("rollout-0", 1, (0, 1)),
        ("rollout-1", 1, (2, 3)),
        ("teacher-0", 0, (5,)),
    ]


def test_one_machine_takes_every_role_wherever_a_cluster_would_have_it():
    made = config(cluster={"nodes": 2, "learner": [1]}, eval={"prompts": "h"})
    found = place(made, Resources(nodes=1), generation=True)
    assert {p.node for p in found} == {0} and [p.role for p in found][-1] == "evaluate"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"learner": {"data_parallel": 8}, "rollout": {"replicas": 2, "tensor_parallel": 4}, "cluster": {"nodes": 2}},
            r"teacher-0 wants 1 GPUs of one node, but left are 0 on node 0, 0 on node 1 "
            r"\(wanted in all: learner 1 x 8 \+ rollout 2 x 4 \+ teacher 1 x 1 = 17 GPUs; there: 2 nodes x 8 = 16\); lower",
        ),
        ({"rollout": {"tensor_parallel": 16}, "cluster": {"nodes": 4}}, "rollout-0 wants 16 GPUs of one node"),
        (
            {"cluster": {"nodes": 2, "learner": [0], "rollout": [0], "gpus_per_node": 1}},
            "rollout-0 wants 1 GPUs of one node, but left are 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(sections, message):
    made = config(run={"device": "cuda"}, **sections)
    with pytest.raises(ConfigError, match=message):
        place(made, cluster_resources(made), generation=True)


def test_a_placement_survives_its_file(tmp_path):
    made = config(learner={"tensor_parallel": 2, "cores": [1, 0]})
    found = place(made, Resources(nodes=1), generation=True)
    placement.save(found, tmp_path)
    assert placement.load(tmp_path) == found
    with pytest.raises(ConfigError, match=r"holds no placement\.json"):
        placement.load(tmp_path / "nowhere")


def test_a_placement_is_a_value():
    made = config()
    found = place(made, Resources(nodes=1), generation=False)
    assert found == place(made, Resources(nodes=1), generation=False)
    assert "rollout" not in {p.role for p in found}
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].node = 1


@pytest.mark.parametrize(("role", "taken"), [("learner", {}), ("teacher", {"learner": {"tensor_parallel": 2}})])
def test_a_tensor_parallel_group_that_would_straddle_nodes_is_refused(role, taken):
    sections = {"run": {"device": "cuda"}, **taken, role: {"tensor_parallel": 4}}
    cluster = {"nodes": 3, "gpus_per_node": 3, "rollout": [2]}
    made = config(**sections, cluster=cluster)
    with pytest.raises(
        ConfigError, match=rf"{role} ranks 0 to 3, a tensor-parallel group, would sit on nodes 0, 1; make {role}\.tensor_parallel=4"
    ):
        place(made, cluster_resources(made), generation=True)
