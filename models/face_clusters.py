"""Groups the faces of a film into characters.

Only good faces form clusters, so that a blurred or tiny one, whose embedding lies somewhere between persons, cannot
bridge two of them; the others join the nearest character afterwards, or stay alone. Two faces of one keyframe are
never the same character.

Dimensions: face; dim: width of the identity embedding. A label is a character's number from 0; -1 is none.
"""

import itertools

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist, pdist

_FORBIDDEN = 1e12
"""Distance between faces of one keyframe: so large that an average that has it stays above any threshold."""


def cluster_faces(
    identities: Float[ndarray, "face dim"], frames: Int[ndarray, " face"], max_distance: float
) -> Int[ndarray, " face"]:
    """Agglomerative clustering with average linkage: labels 0.. for all faces, clusters of one included.

    Clusters merge while the mean Euclidean distance between their faces is at most `max_distance`. Takes
    16 * face^2 / 2 bytes at its peak.
    """
    if len(identities) < 2:
        return np.zeros(len(identities), np.int64)
    distances = pdist(identities.astype(np.float64))
    distances[_pairs_of_one_frame(frames)] = _FORBIDDEN
    return fcluster(linkage(distances, "average"), max_distance, "distance").astype(np.int64) - 1


def _pairs_of_one_frame(frames: Int[ndarray, " face"]) -> Int[ndarray, " pair"]:
    """Where pairs of faces of the same keyframe stand in the condensed distance matrix of scipy."""
    count, by_frame = len(frames), {}
    for face, frame in enumerate(frames.tolist()):
        by_frame.setdefault(frame, []).append(face)
    pairs = [pair for faces in by_frame.values() for pair in itertools.combinations(faces, 2)]
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    return count * first - first * (first + 1) // 2 + second - first - 1


def drop_small_clusters(labels: Int[ndarray, " face"], min_faces: int) -> Int[ndarray, " face"]:
    """`labels` with -1 for the faces of clusters that have fewer than `min_faces`."""
    counts = np.bincount(labels[labels >= 0], minlength=1)
    return np.where((labels >= 0) & (counts[labels] >= min_faces), labels, -1)


def find_centroids(
    identities: Float[ndarray, "face dim"], labels: Int[ndarray, " face"]
) -> dict[int, Float[ndarray, " dim"]]:
    """The mean embedding of each character, by label."""
    return {int(label): identities[labels == label].mean(axis=0) for label in np.unique(labels[labels >= 0])}


def join_nearest(
    identities: Float[ndarray, "face dim"],
    frames: Int[ndarray, " face"],
    labels: Int[ndarray, " face"],
    candidates: Bool[ndarray, " face"],
    max_distance: float,
) -> Int[ndarray, " face"]:
    """`labels` with each of `candidates` joined to the nearest character that its keyframe does not show yet.

    Nearest pairs go first; a face farther than `max_distance` from every centroid keeps -1.
    """
    joined = labels.copy()
    centroids = find_centroids(identities, labels)
    waiting = np.flatnonzero(candidates & (labels < 0))
    if not centroids or not len(waiting):
        return joined
    names = np.array(list(centroids))
    distances = cdist(identities[waiting], np.stack(list(centroids.values())))
    shown = {(int(frame), int(label)) for frame, label in zip(frames, labels, strict=True) if label >= 0}
    for flat in np.argsort(distances, axis=None, kind="stable"):
        face, column = divmod(int(flat), len(names))
        if distances[face, column] > max_distance:
            break
        place = (int(frames[waiting[face]]), int(names[column]))
        if joined[waiting[face]] < 0 and place not in shown:
            joined[waiting[face]] = names[column]
            shown.add(place)
    return joined


def rank_by_screen_time(labels: Int[ndarray, " face"], frames: Int[ndarray, " face"]) -> Int[ndarray, " face"]:
    """Renumber characters: 0 is in the most keyframes, ties go to who appears first."""

    def place(label: int) -> tuple[int, int, int]:
        faces = np.flatnonzero(labels == label)
        return -len(np.unique(frames[faces])), int(frames[faces].min()), int(faces[0])

    order = sorted(np.unique(labels[labels >= 0]).tolist(), key=place)
    rank = {label: i for i, label in enumerate(order)}
    return np.array([rank.get(label, -1) for label in labels.tolist()], np.int64)


def choose_representatives(
    labels: Int[ndarray, " face"], frames: Int[ndarray, " face"], quality: Float[ndarray, " face"], count: int
) -> Bool[ndarray, " face"]:
    """Mark up to `count` faces of each character: the best of each of `count` equal runs of its appearances.

    Taking them from all over the film shows the character in different light, from different sides.
    """
    marked = np.zeros(len(labels), bool)
    for label in np.unique(labels[labels >= 0]):
        faces = np.flatnonzero(labels == label)
        faces = faces[np.argsort(frames[faces], kind="stable")]
        for run in np.array_split(faces, min(count, len(faces))):
            marked[run[quality[run].argmax()]] = True
    return marked
