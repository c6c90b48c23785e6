"""Questions and answers as LLaVA reads them: `train.jsonl`, a pair a line, and the images as files beside it.

    {"id": "SAMPLE-KIND", "image": "images/train/00000/000000000.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is the diagnosis?"}, {"from": "gpt", "value": "…"}]}

What is asked is `dermray.corpus.questions`: closed questions are those that the evaluation task `vqa` asks of the split
at its default seed, without those whose words hold `<image>`. A split has a file of its own, and answers to choose from
are its own samples'; patients are apart where the corpus's splits keep them apart. Lesions, ages, sexes and symptoms
are not asked for: no picture shows them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, TextIO

from dermray.corpus import branches
from dermray.corpus.accounts import require_balance
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import Ontology
from dermray.corpus.questions.closed import YES_OR_NO, Asker, Facts, Pool, Question
from dermray.corpus.questions.open import Pair, Teller
from dermray.corpus.questions.templates import Templates
from dermray.export import image_files
from dermray.export.manifest import PartRecord
from dermray.export.parts import CAPTIONS, UNCAPTIONED, Part, Samples, publish_text, titles
from dermray.export.settings import ExportConfig

QUESTIONS = "questions"
# Where LLaVA puts the picture: a record whose texts hold one more than that of its picture cannot be read.
IMAGE_TOKEN = "<image>"
HOLDS_TOKEN = f"{IMAGE_TOKEN} in its words"
# Names of a part's figures: `asked.KIND` pairs, and `not_asked.KIND.REASON` samples.
ASKED, NOT_ASKED = "asked", "not_asked"
_LETTERS = "ABCD"


def plan(split: str, num_samples: int, config: ExportConfig) -> list[Part]:
    """The folders of images of a split, as open_clip's tables have them, and its file of questions."""
    return [
        *image_files.plan(split, num_samples, config),
        Part(QUESTIONS, split, 0, 0, num_samples, (f"{split}.jsonl",)),
    ]


def write(part: Part, samples: Samples, config: ExportConfig) -> PartRecord:
    """Write a folder of images or a file of questions; the same bytes each time.

    Raises:
        CorpusError: a shard or the disease tree is gone or damaged.
        StorageError, OSError: the output cannot be written.
    """
    if part.kind == image_files.IMAGES:
        return image_files.write(part, samples, config)
    (path,) = part.paths
    return publish_text(config.output, path, lambda sink: _write_pairs(sink, part, samples, config))


def _write_pairs(sink: TextIO, part: Part, samples: Samples, config: ExportConfig) -> dict[str, int]:
    assert part.split is not None
    ontology = _tree(part, samples, config)
    pool = Pool.of(Facts.of(sample, ontology) for sample in _rows(part, samples))
    asker, teller, words = Asker(pool, ontology), Teller(pool, ontology), Templates.load()
    asked, not_asked, captioned = Counter[str](), Counter[tuple[str, str]](), 0
    paths = image_files.paths(part.split, part.last, config)
    for path, sample in zip(paths, _rows(part, samples), strict=True):
        caption = next(iter(titles(sample["captions"], config.aspects)), None)
        captioned += caption is not None
        found: dict[str, Pair | Question | str] = {
            **teller.tell(sample, caption),
            **{f"closed_{kind}": each for kind, each in asker.ask(Facts.of(sample, ontology)).items()},
        }
        for kind, each in found.items():
            pair = closed_pair(each, words) if isinstance(each, Question) else each
            if isinstance(pair, Pair) and IMAGE_TOKEN in pair.question + pair.answer:
                pair = HOLDS_TOKEN
            if isinstance(pair, str):
                not_asked[kind, pair] += 1
                continue
            asked[kind] += 1
            sink.write(json.dumps(_record(f"{sample['sample_id']}-{kind}", path, pair), ensure_ascii=False) + "\n")
    for kind in {*asked, *(kind for kind, _ in not_asked)}:
        told = {reason: count for (other, reason), count in not_asked.items() if other == kind}
        require_balance(f"questions of {kind}", part.last - part.first, asked[kind], told)
    return {
        CAPTIONS: captioned,
        UNCAPTIONED: part.last - part.first - captioned,
        **{f"{ASKED}.{kind}": count for kind, count in sorted(asked.items())},
        **{f"{NOT_ASKED}.{kind}.{reason}": count for (kind, reason), count in sorted(not_asked.items())},
    }


def closed_pair(question: Question, words: Templates) -> Pair:
    """A closed question as text: answers by letters, or yes and no."""
    right = question.options[question.answer]
    if question.options == YES_OR_NO:
        return Pair(f"{question.text} {words.yes_or_no}", right)
    listed = [f"{letter}. {option}" for letter, option in zip(_LETTERS, question.options, strict=False)]
    return Pair("\n".join([question.text, *listed, words.choose]), listed[question.answer])


def _record(name: str, path: str, pair: Pair) -> dict[str, Any]:
    return {
        "id": name,
        "image": path,
        "conversations": [
            {"from": "human", "value": f"{IMAGE_TOKEN}\n{pair.question}"},
            {"from": "gpt", "value": pair.answer},
        ],
    }


def _rows(part: Part, samples: Samples) -> Iterator[dict[str, Any]]:
    """Samples of the part without their images, one row group in memory at a time."""
    assert part.split is not None
    columns = [name for name in samples.columns.names if name != "image"]
    return samples.rows(part.split, part.first, part.last, columns)


def _tree(part: Part, samples: Samples, config: ExportConfig) -> Ontology:
    """The corpus's tree, or one level of the labels that occur where it has none."""
    if Manifest.load(config.corpus).ontology_sha256 is not None:
        return branches.load(config.corpus)
    return Ontology.flat({label for sample in _rows(part, samples) for label in sample["labels"]})
