"""Draws from a policy with duplicates merged: how they are stored and shipped, and laid out again for the learner.

Dimension key: R response tokens, m draws per position, M distinct draws of the whole response, U columns.
"""

import numpy as np


def merge(ids_Rm: np.ndarray, logp_Rm: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(ids [M] int32, counts [M] int32, sizes [R] int32, logp [M] float32): each id once per position, by rising id.

    A duplicate costs no memory, and no score of a teacher, but counts as often as it was drawn.
    """
    order = np.argsort(ids_Rm, axis=1, kind="stable")
    ids_Rm, logp_Rm = (np.take_along_axis(array, order, 1) for array in (ids_Rm, logp_Rm))
    first_Rm = np.ones(ids_Rm.shape, bool)
    first_Rm[:, 1:] = ids_Rm[:, 1:] != ids_Rm[:, :-1]
    starts = np.append(np.flatnonzero(first_Rm), first_Rm.size)
    sizes = first_Rm.sum(1)
    return ids_Rm[first_Rm].astype(np.int32), np.diff(starts).astype(np.int32), sizes.astype(np.int32), logp_Rm[first_Rm].astype(np.float32)


def spread(values_M: np.ndarray, sizes_R: np.ndarray, columns: int) -> np.ndarray:
    """[R, U]: the values of each position side by side, filled with 0."""
    laid = np.zeros((len(sizes_R), columns), values_M.dtype)
    laid[filled(sizes_R, columns)] = values_M
    return laid


def filled(sizes_R: np.ndarray, columns: int) -> np.ndarray:
    """[R, U] True where `spread` puts a value."""
    return np.arange(columns) < sizes_R[:, None]
