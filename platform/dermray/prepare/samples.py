"""From the raw rows of one image to a prepared sample: captions, labels, concepts, and the counts of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dermray.corpus import branches
from dermray.corpus.captions import (
    MAX_SUB_CAPTIONS,
    Caption,
    concept_caption,
    diagnosis_path,
    joined,
    ontology_caption,
    sub_captions,
    with_sub_captions,
)
from dermray.corpus.ontology import Ontology, Resolution, display_names
from dermray.corpus.schema import sample_id
from dermray.images import StandardImage

RawRow = Mapping[str, Any]
Counts = dict[str, Counter[str]]

# Caption lengths are counted in steps of this many words, all longer ones in the last step.
WORDS_STEP = 10
WORDS_LIMIT = 300
# Counts of a shard: equal images whose rows name different diseases.
COPIES = "copies"
# Samples by the kind of their picture; those of which nothing is known are not counted.
MODALITIES = "modalities"
# Samples of which no text says anything, by split.
UNTEXTED = "untexted"


def build_sample(
    rows: Sequence[RawRow],
    resolutions: Sequence[Resolution],
    image: StandardImage,
    split: str,
    ontology: Ontology,
    *,
    num_sub_captions: int = 0,
) -> dict[str, Any]:
    """One sample of `corpus.schema.WHOLE` from all the rows of an image, in table order, and their `resolve_labels`.

    Captions, labels and concepts are the union over the rows; single values are those of the first row that has them.
    `num_sub_captions` sentences of the raw captions become sub-captions, unless the source brings its own.
    """
    captions = [
        _captions(row, resolution, ontology, num_sub_captions)
        for row, resolution in zip(rows, resolutions, strict=True)
    ]
    first = rows[0]
    return {
        "sample_id": sample_id(first["source"], image.jpeg),
        "image": image.jpeg,
        "width": image.width,
        "height": image.height,
        "captions": [{"aspect": aspect, "text": text} for aspect, text in _bounded(captions)],
        "labels": list(dict.fromkeys(label for found in resolutions for label in found.labels)),
        "concepts": list(dict.fromkeys(concept for row in rows for concept in row["concepts"])),
        "skin_type": next((row["skin_type"] for row in rows if row["skin_type"] is not None), None),
        "source": first["source"],
        "source_id": first["source_id"],
        "meta": first["meta"],
        "split": split,
        "phash": image.phash,
        "duplicate_group": None,
        "modality": next((row["modality"] for row in rows if row["modality"] is not None), None),
    }


def resolve_labels(row: RawRow, ontology: Ontology) -> Resolution:
    """Labels of a row: what its label texts name, or else the finest node that its published path names.

    A sample that was prepared before names nodes, and keeps those that this tree has.
    """
    if row.get("prepared"):
        unknown = tuple(label for label in row["labels"] if label not in ontology)
        return Resolution(tuple(label for label in row["labels"] if label in ontology), unknown)
    found = [ontology.resolve_all(text) for text in row["labels"]]
    labels = [label for part in found for label in part.labels]
    unresolved = [text for part in found for text in part.unresolved]
    if row["labels"] and not labels and row["hierarchy"]:
        above = row["hierarchy"].split(",")
        # A malignancy that the tree does not know is nothing benign, whatever the path says.
        if not any(branches.denies(text, above) for text in unresolved):
            labels = list(ontology.resolve_all(row["hierarchy"]).labels[-1:])
    return Resolution(tuple(ontology.most_specific(labels)), tuple(unresolved))


def differing(named: Sequence[Sequence[str]], ontology: Ontology) -> list[str]:
    """The diseases of several rows, each given by its nodes; none where one row names all, and others say less."""
    every = ontology.most_specific(node for nodes in named for node in nodes)
    return [] if any(set(every) <= set(nodes) for nodes in named) else every


def contradicts(row: RawRow, resolution: Resolution, ontology: Ontology) -> bool:
    """True if a row's published path goes by another branch than its label is known to be on.

    That is by the tree, or by the package's table of what is benign or malignant.
    """
    named = set(ontology.named_in(row["hierarchy"] or ""))
    # What the tree does not know may say benign as well.
    above = named | {part for part in (row["hierarchy"] or "").split(",") if ontology.resolve(part) is None}
    if _any_denies(resolution, above.difference(resolution.labels)):
        return True
    for label in resolution.labels:
        elsewhere = named.intersection(ontology.ancestors(label)).difference(ontology.path(label))
        if elsewhere and ontology.is_certain(label):
            return True
    return False


def _captions(row: RawRow, resolution: Resolution, ontology: Ontology, num_sub_captions: int) -> list[Caption]:
    """A row's captions: those of the source, and the sentences of the aspects that the source does not bring.

    No diagnosis and no concepts are put into words for a sample that was prepared before.
    """
    captions: list[Caption] = [
        (caption["aspect"], caption["text"])
        for caption in row["captions"]
        if caption["aspect"] != "ontology" or row.get("prepared") or not _denied(caption["text"], resolution)
    ]
    brought = {aspect for aspect, _ in captions}
    if row.get("prepared"):
        brought.update(("ontology", "concept"))
    if row["labels"] and "ontology" not in brought:
        if row["hierarchy"] and not contradicts(row, resolution, ontology):
            named = row["hierarchy"].split(",")
        else:
            named = [*diagnosis_path(resolution.labels, ontology), *resolution.unresolved]
        sentence = ontology_caption(named)
        if sentence:
            captions.append(("ontology", sentence))
    sentence = concept_caption(row["concepts"])
    if sentence and "concept" not in brought:
        captions.append(("concept", sentence))
    if num_sub_captions and "sub" not in brought:
        return with_sub_captions(captions, lambda text: sub_captions(text, num_sub_captions))
    return captions


def _denied(sentence: str, resolution: Resolution) -> bool:
    """Whether a source's own sentence over the diagnosis names a malignancy of the row among benign diseases."""
    named = sentence.rpartition(" diagnosed as ")[2].rstrip(" .").split(",")
    return _any_denies(resolution, named)


def _any_denies(resolution: Resolution, above: Iterable[str]) -> bool:
    """Whether a disease of a row is known not to be what its path names above it."""
    diseases, names = (*resolution.labels, *resolution.unresolved), list(above)
    mixed = any(map(branches.is_benign, diseases))
    return any(branches.denies(text, names, mixed=mixed) for text in diseases)


def _bounded(several: Iterable[Sequence[Caption]]) -> list[Caption]:
    """The captions of several rows or samples together, at most `MAX_SUB_CAPTIONS` of them sub-captions."""
    kept = joined(several)
    last = [place for place, (aspect, _) in enumerate(kept) if aspect == "sub"][MAX_SUB_CAPTIONS:]
    return [caption for place, caption in enumerate(kept) if place not in last] if last else kept


def merge_samples(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One sample from several of the same image: the first one's, with the captions, labels and concepts of all."""
    first = dict(samples[0])
    if len(samples) == 1:
        return first
    captions = [[(caption["aspect"], caption["text"]) for caption in sample["captions"]] for sample in samples]
    first["captions"] = [{"aspect": aspect, "text": text} for aspect, text in _bounded(captions)]
    for name in ("labels", "concepts"):
        first[name] = list(dict.fromkeys(value for sample in samples for value in sample[name]))
    for name in ("skin_type", "meta", "modality"):
        first[name] = next((sample[name] for sample in samples if sample[name] is not None), None)
    return first


def count_rows(
    counts: Counts,
    rows: Sequence[RawRow],
    resolutions: Sequence[Resolution],
    image: StandardImage,
    ontology: Ontology,
) -> None:
    """Add the rows of one image, and its original, to the counts that the report shows."""
    counts["origins"][rows[0]["origin"] or rows[0]["source"]] += 1
    counts["formats"][image.original.format] += 1
    counts["sizes"][_size_class(image)] += 1
    counts["brightness"]["dark"] += image.is_dark
    for row, resolution in zip(rows, resolutions, strict=True):
        if row["labels"]:
            counts["rows"]["labelled"] += 1
            counts["rows"]["resolved"] += bool(resolution.labels)
            counts["unresolved"].update(resolution.unresolved)
            if contradicts(row, resolution, ontology):
                counts["rows"]["contradicted"] += 1


def count_copies(counts: Counts, samples: Sequence[Mapping[str, Any]], ontology: Ontology) -> None:
    """Note samples of one image that name different diseases before they are merged."""
    names = display_names(differing([sample["labels"] for sample in samples if sample["labels"]], ontology))
    if names:
        counts[COPIES][f"{' and '.join(sample['source_id'] for sample in samples)}: {'; '.join(names)}"] += 1


def count_sample(counts: Counts, sample: Mapping[str, Any]) -> None:
    """Add one sample to the counts that the report shows."""
    counts["sources"][sample["source"]] += 1
    counts["skin_types"][str(sample["skin_type"] or "unknown")] += 1
    if sample["modality"]:
        counts[MODALITIES][sample["modality"]] += 1
    if not sample["captions"]:
        counts[UNTEXTED][sample["split"]] += 1
    counts["captions"].update(caption["aspect"] for caption in sample["captions"])
    for caption in sample["captions"]:
        words = min(len(caption["text"].split()), WORDS_LIMIT)
        counts[f"words_{caption['aspect']}"][str(words // WORDS_STEP * WORDS_STEP)] += 1
    counts["concepts"].update(sample["concepts"])
    counts["labels"].update(sample["labels"])
    body_site = (sample["meta"] or {}).get("body_site")
    counts["body_sites"].update(site.strip() for site in (body_site or "").split(",") if site.strip())


def _size_class(image: StandardImage) -> str:
    """Class of the original's shorter side."""
    shorter = min(image.original.width, image.original.height)
    for edge in (128, 256, 512, 1024, 2048):
        if shorter < edge:
            return f"< {edge} px"
    return "2048 px and more"
