import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.face_clusters import (
    choose_representatives,
    cluster_faces,
    drop_small_clusters,
    find_centroids,
    join_nearest,
    rank_by_screen_time,
)


def test_near_faces_share_a_cluster_and_far_ones_do_not() -> None:
    identities = np.array([[0.0, 0], [0.1, 0], [5, 5], [5, 5.1]])
    labels = cluster_faces(identities, np.arange(4), 0.5)
    assert labels[0] == labels[1] != labels[2] == labels[3]


def test_faces_of_one_frame_never_share_a_cluster_even_through_others() -> None:
    identities = np.zeros((4, 2))
    frames = np.array([7, 7, 8, 9])
    labels = cluster_faces(identities, frames, 0.5)
    assert labels[0] != labels[1]


@given(st.integers(0, 10**6), st.integers(0, 12), st.integers(1, 5))
@settings(deadline=None)
def test_no_cluster_holds_two_faces_of_a_frame(seed: int, count: int, frames: int) -> None:
    generator = np.random.default_rng(seed)
    identities, frame = generator.random((count, 3)), generator.integers(0, frames, count)
    labels = cluster_faces(identities, frame, 10.0)
    pairs = list(zip(frame.tolist(), labels.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)


def test_none_and_one() -> None:
    assert cluster_faces(np.zeros((0, 3)), np.zeros(0, int), 0.5).tolist() == []
    assert cluster_faces(np.zeros((1, 3)), np.zeros(1, int), 0.5).tolist() == [0]


def test_small_clusters_are_dropped() -> None:
    assert drop_small_clusters(np.array([0, 0, 0, 1, 1, -1]), 3).tolist() == [0, 0, 0, -1, -1, -1]
    assert drop_small_clusters(np.zeros(0, int), 3).tolist() == []


def test_poor_faces_join_the_nearest_character_but_not_twice_in_a_frame() -> None:
    identities = np.array([[0.0], [0.0], [1.0], [1.0], [0.1], [0.2], [9.0]])
    frames = np.array([1, 2, 1, 2, 3, 3, 3])
    labels = np.array([0, 0, 1, 1, -1, -1, -1])
    joined = join_nearest(identities, frames, labels, labels < 0, 0.5)
    assert joined.tolist() == [0, 0, 1, 1, 0, -1, -1]
    assert join_nearest(identities, frames, labels, labels < 0, 0.9).tolist() == [0, 0, 1, 1, 0, 1, -1]


def test_nobody_to_join() -> None:
    labels = np.array([-1, -1])
    assert join_nearest(np.zeros((2, 1)), np.arange(2), labels, labels < 0, 1.0).tolist() == [-1, -1]


def test_characters_are_ranked_by_frames_then_by_first_appearance() -> None:
    labels = np.array([4, 2, 2, 9, 9, -1])
    frames = np.array([0, 10, 20, 5, 30, 1])
    assert rank_by_screen_time(labels, frames).tolist() == [2, 1, 1, 0, 0, -1]


def test_representatives_are_the_best_of_each_part_of_the_film() -> None:
    labels = np.array([0] * 6 + [1, -1])
    frames = np.array([60, 50, 40, 30, 20, 10, 10, 20])
    quality = np.array([1.0, 2, 3, 4, 5, 6, 1, 9])
    marked = choose_representatives(labels, frames, quality, 2)
    assert np.flatnonzero(marked).tolist() == [2, 5, 6]


def test_centroids_are_means_of_labelled_faces() -> None:
    centroids = find_centroids(np.array([[0.0], [2.0], [100.0]]), np.array([0, 0, -1]))
    assert list(centroids) == [0] and centroids[0] == 1.0
