"""The shape of a disease tree: what is above and below each node, and what holds on all of a node's paths.

A directed acyclic graph under one root. A node listed directly under one of its own ancestors, besides its parent, says
by this by way of which branch it is meant: with `malignant: [melanocytic, melanoma]` and `melanocytic: [melanoma]` the
path of melanoma is malignant, melanocytic, melanoma, also where `melanocytic` hangs under `benign` as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dermray.errors import OntologyError

ROOT = "root"
# What a tree may hold: far above any published one, and small enough that nothing below takes minutes or gigabytes.
MAX_NODES = 2_000_000
MAX_EDGES = 4_000_000
MAX_DEPTH = 200
# Nodes looked at in search of paths that cross, over all nodes.
MAX_STEPS = 20_000_000
# Nodes of a cycle that its error names.
SHOWN_OF_CYCLE = 12


class Graph:
    """An immutable graph of node names; work and memory grow with its edges, which are bounded."""

    def __init__(self, children: Mapping[str, Iterable[str]]) -> None:
        """Build from node → children.

        Raises:
            OntologyError: no root, a cycle, a node that the root does not reach, or more of anything than a tree may
                have.
        """
        self._children = {name: tuple(dict.fromkeys(below)) for name, below in children.items()}
        for below in list(self._children.values()):
            for child in below:
                self._children.setdefault(child, ())
        if ROOT not in self._children:
            raise OntologyError(f"the ontology has no node {ROOT!r}; its top level must be listed there")
        self._parents: dict[str, list[str]] = {name: [] for name in self._children}
        for name, below in self._children.items():
            for child in below:
                self._parents[child].append(name)
        if len(self._children) > MAX_NODES:
            raise OntologyError(f"it has {len(self._children):,} nodes; an ontology may have {MAX_NODES:,}")
        num_edges = sum(map(len, self._children.values()))
        if num_edges > MAX_EDGES:
            raise OntologyError(f"its nodes list {num_edges:,} children; an ontology may list {MAX_EDGES:,}")
        self._order = self._sorted_from_root()
        self._depths = self._longest_ways()
        self._steps = 0
        self._paths: dict[str, tuple[str, ...]] = {}

    def to_json(self) -> dict[str, list[str]]:
        """The mapping that `from_json` reads, in file order."""
        return {name: list(below) for name, below in self._children.items()}

    def _sorted_from_root(self) -> tuple[str, ...]:
        """Every node, parents first; proves that there is no cycle and no orphan."""
        waiting = {name: len(parents) for name, parents in self._parents.items()}
        if waiting[ROOT]:
            raise OntologyError(f"{ROOT!r} is listed as a child of {self._parents[ROOT][0]!r}: a cycle")
        orphans = [name for name, count in waiting.items() if count == 0 and name != ROOT]
        if orphans:
            raise OntologyError(f"{_name_some(orphans)} under no parent: list each in some node, or remove it")
        order: list[str] = []
        ready = [ROOT]
        while ready:
            name = ready.pop()
            order.append(name)
            for child in reversed(self._children[name]):
                waiting[child] -= 1
                if waiting[child] == 0:
                    ready.append(child)
        if len(order) < len(self._children):
            raise OntologyError(f"there is a cycle: {' > '.join(self._cycle(set(self._children) - set(order)))}")
        return tuple(order)

    def _cycle(self, stuck: set[str]) -> list[str]:
        """One cycle among nodes that a topological order could not place, its first node repeated at the end."""
        # Every stuck node has a stuck parent, so walking up must come round.
        name = min(stuck)
        walk: dict[str, int] = {}
        while name not in walk:
            walk[name] = len(walk)
            name = next(parent for parent in self._parents[name] if parent in stuck)
        nodes = [name, *reversed(list(walk)[walk[name] :])]
        if len(nodes) <= 3 * SHOWN_OF_CYCLE:
            return nodes
        left_out = f"… {len(nodes) - SHOWN_OF_CYCLE:,} more …"
        return [*nodes[: SHOWN_OF_CYCLE - 1], left_out, nodes[-1]]

    def _longest_ways(self) -> dict[str, int]:
        """Number of edges of the longest way from the root to each node."""
        depths = {ROOT: 0}
        for name in self._order[1:]:
            depths[name] = 1 + max(depths[parent] for parent in self._parents[name])
            if depths[name] > MAX_DEPTH:
                raise OntologyError(f"{name!r} is more than {MAX_DEPTH} levels below {ROOT!r}; a tree may have so many")
        return depths

    def __contains__(self, name: object) -> bool:
        return name in self._children and name != ROOT

    def __iter__(self) -> Iterator[str]:
        """Every node but the root, parents first."""
        return iter(self._order[1:])

    def __len__(self) -> int:
        return len(self._order) - 1

    def children(self, name: str) -> list[str]:
        """Names directly below a node (or below "root")."""
        self._require(name)
        return list(self._children[name])

    def leaves(self) -> list[str]:
        """Nodes without children, parents' order."""
        return [name for name in self if not self._children[name]]

    def path(self, name: str) -> list[str]:
        """What is above the node on every one of its paths, root's child first, and the node itself last.

        That is its path where it has one. Where it has several, the ancestors that only some of them share are left
        out: what is returned is true whichever path is meant.
        """
        self._require(name)
        return list(self._path(name))

    def levels(self, name: str) -> list[str | None]:
        """The node of the path at each level, from 1; None where the node's paths differ.

        As long as its longest path. Where two paths reach a node at different levels, nothing is known from there on.
        """
        self._require(name)
        known: list[str | None] = []
        above, sure = ROOT, True
        for node in self._path(name):
            shortest, longest = self._gap(above, node)
            sure = sure and shortest == longest
            known += [None] * (longest - 1) + [node if sure else None]
            above = node
        return known

    def is_certain(self, name: str) -> bool:
        """True if the node has one path."""
        self._require(name)
        way = [ROOT, *self._path(name)]
        return all(above in self._parents_of(below) for above, below in pairwise(way))

    def level(self, name: str) -> int:
        """1 for the root's children, counted along the shortest path; 0 for the root."""
        self._require(name)
        return self._levels[name]

    def parents(self, name: str) -> list[str]:
        """Names directly above a node, without those that only say which branch is meant; "root" for the upmost."""
        self._require(name)
        return list(self._parents_of(name))

    def branch_marks(self, name: str) -> list[str]:
        """The ancestors by way of which the node is meant: those that list it although its parent is below them."""
        self._require(name)
        return [above for above in self._parents[name] if above in self._marks.get(name, ()) and above != ROOT]

    def ancestors(self, name: str) -> list[str]:
        """Every node above, over all paths, without the root: nearest first, each once."""
        self._require(name)
        found: dict[str, None] = {}
        pending = deque(self._parents[name])
        while pending:
            parent = pending.popleft()
            if parent != ROOT and parent not in found:
                found[parent] = None
                pending.extend(self._parents[parent])
        return list(found)

    def descendants(self, name: str) -> list[str]:
        """Every node below, whichever of its paths is meant, each once, in the order of a walk from the top."""
        self._require(name)
        below = {name}
        found: list[str] = []
        for node in self._order:
            if node not in below and any(parent in below for parent in self._parents[node]):
                below.add(node)
                if name == ROOT or name in self._path(node):
                    found.append(node)
        return found

    def similarity(self, names: Sequence[str]) -> npt.NDArray[np.float64]:
        """How near nodes stand to each other, Wu and Palmer's measure: float64 `[C, C]`, symmetric, in [0, 1].

        `2 * depth(a) / (depth(x) + depth(y))`, where a is the deepest node that both lie below or are; 1 of a node with
        itself, 0 of nodes of two top-level trees. The top level has depth 1. Of a node with several paths only what is
        above it on every one counts, as everywhere here, and its depth is that of the shortest path.

        Args:
            names: of nodes; one may come several times.

        Raises:
            OntologyError: a name is no node.
        """
        if ROOT in names:
            raise OntologyError(f"{ROOT!r} stands above the tree and is no node of it")
        depths: dict[str, int] = {}

        def depth(node: str) -> int:
            if node not in depths:
                # Where branch marks choose the longer way, a node still is deeper than what is above it.
                depths[node] = max(self._levels[node], 1 + max(map(depth, self._path(node)[:-1]), default=0))
            return depths[node]

        below: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            for node in self.path(name):
                below.setdefault(node, []).append(place)
        common = np.zeros((len(names), len(names)))
        for node in sorted(below, key=depth):
            common[np.ix_(below[node], below[node])] = depth(node)
        own = np.array([depth(name) for name in names], dtype=np.float64)
        return 2 * common / (own[:, None] + own)

    def most_specific(self, names: Iterable[str]) -> list[str]:
        """The given nodes, each once, without those that are ancestors of another one."""
        listed = list(dict.fromkeys(names))
        if len(listed) < 2:
            return listed
        above = {ancestor for name in listed for ancestor in self.ancestors(name)}
        return [name for name in listed if name not in above]

    def deepest(self, names: Iterable[str]) -> str | None:
        """The most specific of some labels: the deepest node, of equals the first; None without any.

        A label that is no node stands above all of them.
        """
        return max(names, key=lambda name: self.level(name) if name in self else 0, default=None)

    def _require(self, name: str) -> None:
        if name not in self._children:
            raise OntologyError(f"the ontology has no node {name!r}; resolve() finds the node that a text names")

    def _parents_of(self, name: str) -> list[str]:
        """The node's parents without its branch marks."""
        marks = self._marks.get(name)
        return [parent for parent in self._parents[name] if parent not in marks] if marks else self._parents[name]

    @cached_property
    def _marks(self) -> dict[str, frozenset[str]]:
        """Of each node with several parents, those that are ancestors of another one of them."""
        marks: dict[str, frozenset[str]] = {}
        for name in self._order:
            above = self._parents[name]
            if len(above) > 1:
                found = self._among_ancestors(above)
                if found:
                    marks[name] = found
        return marks

    def _among_ancestors(self, names: Sequence[str]) -> frozenset[str]:
        """Those of some nodes that are above another one of them."""
        wanted, highest = set(names), min(self._depths[name] for name in names)
        seen: set[str] = set()
        pending = [parent for name in names for parent in self._parents[name]]
        while pending:
            node = pending.pop()
            self._count_step()
            # What is less deep than all of them has none of them above it.
            if node not in seen and self._depths[node] >= highest:
                seen.add(node)
                pending.extend(self._parents[node])
        return frozenset(wanted & seen)

    def _count_step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise OntologyError("its nodes have so many ancestors in common that their paths cannot be told apart")

    @cached_property
    def _levels(self) -> dict[str, int]:
        """Length of the shortest path of each node."""
        levels = {ROOT: 0}
        for name in self:
            levels[name] = 1 + min(levels[parent] for parent in self._parents_of(name))
        return levels

    def _path(self, name: str) -> tuple[str, ...]:
        """`path`, made once; as deep a recursion as the tree has levels."""
        if name == ROOT:
            return ()
        if name not in self._paths:
            parents, marks = self._parents_of(name), self._marks.get(name, frozenset())
            ways = [way for parent in parents for way in self._ways(parent, marks)]
            shared = set(ways[0]).intersection(*ways[1:])
            self._paths[name] = (*(node for node in ways[0] if node in shared), name)
        return self._paths[name]

    def _ways(self, parent: str, marks: frozenset[str]) -> Iterator[tuple[str, ...]]:
        """What holds on the way to a parent: by each of the marks above it, or on all its paths if there is none."""
        through = [mark for mark in marks if mark != ROOT and mark in self._between(ROOT, parent)]
        for mark in through:
            shared = self._shared_below(mark, parent)
            yield (*self._path(mark), *shared)
        if not through:
            yield self._path(parent)

    def _between(self, upper: str, lower: str) -> set[str]:
        """The nodes on the ways from one node down to another, both included; empty if there is no way."""
        least = self._depths[upper]
        above: set[str] = set()
        pending = [lower]
        while pending:
            node = pending.pop()
            self._count_step()
            if node not in above and self._depths[node] >= least:
                above.add(node)
                pending.extend(self._parents[node])
        if upper not in above:
            return set()
        reached = {upper}
        for node in sorted(above, key=self._depths.__getitem__):
            if any(parent in reached for parent in self._parents[node]):
                reached.add(node)
        return reached

    def _shared_below(self, upper: str, lower: str) -> tuple[str, ...]:
        """The nodes on every way from one node down to another, without the first."""
        within = self._between(upper, lower)
        shared: dict[str, tuple[str, ...]] = {upper: ()}
        for node in sorted(within - {upper}, key=self._depths.__getitem__):
            ways = [shared[parent] for parent in self._parents_of(node) if parent in shared]
            ways = ways or [shared[parent] for parent in self._parents[node] if parent in shared]
            common = set(ways[0]).intersection(*ways[1:])
            shared[node] = (*(each for each in ways[0] if each in common), node)
        return shared[lower]

    def _gap(self, upper: str, lower: str) -> tuple[int, int]:
        """Edges of the shortest and of the longest way from one node down to another."""
        if self._parents_of(lower) == [upper]:
            return 1, 1
        shortest, longest = {upper: 0}, {upper: 0}
        for node in sorted(self._between(upper, lower) - {upper}, key=self._depths.__getitem__):
            above = [parent for parent in self._parents_of(node) if parent in shortest]
            if above:
                shortest[node] = 1 + min(shortest[parent] for parent in above)
                longest[node] = 1 + max(longest[parent] for parent in above)
        return shortest[lower], longest[lower]


def _name_some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    rest = f" and {len(names) - 3} more are" if len(names) > 3 else (" is" if len(names) == 1 else " are")
    return f"{shown}{rest}"
