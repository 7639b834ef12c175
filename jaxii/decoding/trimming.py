"""Labels that mean nearly the same, and answers that keep only the best of them.

Before it: the label embedding and the answers of another decoder. After it: answers
with at most two labels of a cluster, as the 2018 recipe gave them.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

# The recipe's 2,030 clusters of 7,178 labels, and labels kept in each.
CLUSTERS_PER_LABEL = 2030 / 7178
MOST_OF_A_CLUSTER = 2


def cluster_labels(
    label_embeddings: Float[np.ndarray, "class embed"],
) -> Int[np.ndarray, " class"]:
    """Returns each label's cluster: average linkage by cosine distance.

    A label without a vector is a cluster of its own. Memory: two float64 matrices of
    class x class; 7,178 labels take some seconds.

    Args:
        label_embeddings: one vector a class; zero where it occurs with no other.

    Returns:
        Numbers from 0.
    """
    lengths = np.linalg.norm(label_embeddings, axis=1)
    linked = np.flatnonzero(lengths)
    clusters = np.arange(len(lengths))
    if len(linked) < 2:
        return clusters
    unit = label_embeddings[linked] / lengths[linked, None]
    distances = np.clip(1 - (unit @ unit.T).astype(np.float64), 0, 2)
    np.fill_diagonal(distances, 0)
    tree = linkage(squareform(distances, checks=False), method="average")
    count = max(1, round(CLUSTERS_PER_LABEL * len(linked)))
    clusters[linked] = fcluster(tree, count, criterion="maxclust") + len(lengths)
    return np.unique(clusters, return_inverse=True)[1]


def trim(
    chosen: Bool[np.ndarray, "batch class"],
    scores: Float[np.ndarray, "batch class"],
    clusters: Int[np.ndarray, " class"],
) -> Bool[np.ndarray, "batch class"]:
    """Returns the answers without the third and further labels of a cluster.

    Args:
        chosen: True where the label is predicted.
        scores: probabilities; the labels of the highest are kept.
        clusters: of each label.

    Returns:
        True where the label is kept; no answer becomes empty.
    """
    rows, labels = np.nonzero(chosen)
    order = np.lexsort((-scores[rows, labels], clusters[labels], rows))
    rows, labels = rows[order], labels[order]
    before = slice(None, -MOST_OF_A_CLUSTER), slice(MOST_OF_A_CLUSTER, None)
    kept = np.ones(len(rows), bool)
    same_row = rows[before[0]] == rows[before[1]]
    same_cluster = clusters[labels[before[0]]] == clusters[labels[before[1]]]
    kept[MOST_OF_A_CLUSTER:] = ~(same_row & same_cluster)
    trimmed = np.zeros_like(chosen)
    trimmed[rows[kept], labels[kept]] = True
    return trimmed
