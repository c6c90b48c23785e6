"""A tiny folder in the layout of every source: three images or more, one of them with nothing said about it."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dermray.raw.sources.skincon import REJECTED
from tests.raw_corpus import photograph

# Spaces and Chinese letters are what the releases have in their file names.
NAMES = ("皮肤 图_1", "b", "c")
Row = Mapping[str, str]


@dataclass(frozen=True)
class Layout:
    """How to write a source, and what its reader must make of it.

    `blank` is the id of the row with placeholders only; `together` are ids that a group holds together.
    """

    write: Callable[[Path], None]
    ids: Sequence[str]
    label: str | None
    blank: str
    table: str | None = None
    column: str | None = None
    together: tuple[str, str] | None = None
    # Folders of images that may lie in an archive of their name as well.
    images: tuple[str, ...] = ()


def write_images(folder: Path, *paths: str) -> None:
    for number, path in enumerate(paths):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(photograph(number, 48, 40))


def write_table(file: Path, rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as sink:
        writer = csv.DictWriter(sink, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# Where each image is: its row group's number, being compressed.
PARQUET_IDS = [
    "data/train-00000-of-00002.parquet!g0r0/image/皮肤 图_1.jpg",
    "data/train-00000-of-00002.parquet!g1r0/image/b.jpg",
    "data/train-00001-of-00002.parquet!g0r0/image/c.jpg",
]


def rows(*given: Row, **shared: str) -> list[Row]:
    return [{**shared, **row} for row in given]


def csv_layout(folder: Path) -> None:
    write_images(folder, *(f"images/{name}.jpg" for name in NAMES))
    a, b, c = (f"images/{name}.jpg" for name in NAMES)
    blank = {"age": "unknown", "sex": "None", "skin_type": "-1"}
    write_table(
        folder / "metadata.csv",
        rows(
            {"image": a, "label": "psoriasis", "patient_id": "p"},
            {"image": b, "label": "psoriasis", "patient_id": "p"},
            {"image": c, "caption": "a caption", "label": "N/A", "patient_id": "", **blank},
            caption="a caption",
            age="40",
            sex="male",
            skin_type="II",
        ),
    )


DERM1M_BLANK = {
    "disease_label": "no definitive diagnosis",
    "hierarchical_disease_label": "",
    "skin_concept": "No visual concepts",
    "body_location": "No body location information",
    "symptoms": "No symptom information",
    "age": "No age information",
    "gender": "No gender information",
}
DERM1M = {
    "caption": "A caption. And more.",
    "truncated_caption": "A caption.",
    "source": "youtube",
    "source_type": "edu",
    "disease_label": "psoriasis",
    "hierarchical_disease_label": "inflammatory, psoriasis",
    "skin_concept": "red, patch",
    "body_location": "neck",
    "symptoms": "tender",
    "age": "45",
    "gender": "male",
}
DERM1M_IMAGES = ("youtube/皮肤 图_frame_1_0.jpg", "youtube/皮肤 图_frame_9_0.jpg", "public/c.jpg", "public/d.jpg")


def derm1m_layout(folder: Path) -> None:
    a, b, c, d = DERM1M_IMAGES
    write_images(folder, *DERM1M_IMAGES)
    write_table(
        folder / "Derm1M_v2_pretrain.csv",
        rows({"filename": a}, {"filename": b}, {"filename": c, **DERM1M_BLANK}, **DERM1M),
    )
    write_table(folder / "Derm1M_v2_validation.csv", rows({"filename": d}, **DERM1M))
    write_table(folder / "concept.csv", [{"filename": d, "disease_label": "x", "Papule": "1", "Scale": "0"}])
    write_tree(folder)


def write_tree(folder: Path) -> None:
    tree = {"root": ["inflammatory"], "inflammatory": ["psoriasis"]}
    (folder / "ontology.json").write_text(json.dumps(tree), encoding="utf-8")


MAKE_ROW = {
    "caption": "Red patch. It itches.",
    "truncated_caption": "Red patch. It itches.",
    "source": "textbook_english",
    "source_type": "knowledge",
    "standardized_disease": "psoriasis",
    "ontology_final": "inflammatory, psoriasis",
    "skin_concept_standarized": "red, patch",
    "body_location": "neck",
    "symptoms": "itch",
    "age": "45",
    "gender": "male",
    "visual_concept_caption": "This skin photo shows red, patch.",
    "ontology_caption": "This is a skin photo diagnosed as inflammatory, psoriasis.",
    "sub_captions": "2",
    "subcaption_1": "Red patch",
    "subcaption_2": "It itches",
    **{f"subcaption_{number}": "" for number in range(3, 9)},
    "sub_caption_mask": "[1, 1, 0, 0, 0, 0, 0, 0]",
    "knowledge_masks": "[1, 1, 1]",
}
MAKE_BLANK = {
    "standardized_disease": "no definitive diagnosis",
    "ontology_final": "",
    "skin_concept_standarized": "No visual concepts",
    "body_location": "No body location information",
    "symptoms": "No symptom information",
    "age": "No age information",
    "gender": "No gender information",
    "visual_concept_caption": "nan",
    "ontology_caption": "",
    "knowledge_masks": "[1, 0, 0]",
}


def make_layout(folder: Path) -> None:
    a, b, c = "textbook/皮肤 图_00384_19121.png", "textbook/皮肤 图_00384_19122.png", "public/c.jpg"
    write_images(folder, a, b, c)
    write_table(
        folder / "MAKE_train.csv",
        rows({"filename": f"/VL_Data/{a}"}, {"filename": b}, {"filename": c, **MAKE_BLANK}, **MAKE_ROW),
    )


AGENTAUG_ROOT = "data/pretrain/images"
# Two images of one name: the release has such, in folders of their own.
AGENTAUG_IMAGES = (
    "textbook/皮肤 图_00384_19121.png",
    "textbook/皮肤 图_00384_19122.png",
    "public/皮肤 图_00384_19121.png",
)


def agentaug_rows() -> list[Row]:
    captions = ("truncated_caption", "ontology_caption", "visual_concept_caption", "sub_caption_mask")
    masks = {"knowledge_masks": MAKE_ROW["knowledge_masks"]}
    said = {name: MAKE_ROW[name] for name in (*captions, *(f"subcaption_{number}" for number in range(1, 9)))}
    return rows(
        {"filename": f"{AGENTAUG_ROOT}/{AGENTAUG_IMAGES[0]}"},
        {"filename": f"{AGENTAUG_ROOT}/{AGENTAUG_IMAGES[1]}", "agent_generated": "False"},
        {
            "filename": f"{AGENTAUG_ROOT}/{AGENTAUG_IMAGES[2]}",
            "truncated_caption": "nan",
            "ontology_caption": "",
            "visual_concept_caption": "",
            "ontology_label": "-1",
        },
        **said,
        **masks,
        ontology_label="17",
        agent_generated="True",
        source="textbook_english",
        source_type="knowledge",
    )


def agentaug_layout(folder: Path) -> None:
    write_images(folder / "images", *AGENTAUG_IMAGES)
    write_table(folder / "MAGEN_train.csv", agentaug_rows())


def agentaug_parquet(folder: Path, *sizes: int) -> None:
    """The same as the release has it: images and texts, in files of so many rows."""
    said = agentaug_rows()
    images = [photograph(number, 48, 40) for number in range(len(said))]
    metadata = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}
    kinds = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), **dict.fromkeys(said[0], pa.string())}
    (folder / "data").mkdir()
    for number, size in enumerate(sizes):
        first = sum(sizes[:number])
        part = [
            {name: cell or None for name, cell in row.items()} | {"image": {"bytes": image, "path": row["filename"]}}
            for row, image in zip(said[first : first + size], images[first : first + size], strict=True)
        ]
        table = pa.Table.from_pylist(part, pa.schema(kinds, metadata=metadata))
        pq.write_table(table, folder / "data" / f"train-{number:05d}.parquet")


def pad_layout(folder: Path) -> None:
    write_images(folder, *(f"images/{name}.png" for name in NAMES))
    a, b, c = (f"{name}.png" for name in NAMES)
    blank = {"diagnostic": "", "fitspatrick": "", "region": "UNK", "age": "", "gender": "", "itch": "UNK"}
    write_table(
        folder / "metadata.csv",
        rows(
            {"img_id": a},
            {"img_id": b, "lesion_id": "2"},
            {"img_id": c, "patient_id": "", **blank},
            patient_id="PAT_1",
            lesion_id="1",
            diagnostic="BCC",
            fitspatrick="2.0",
            region="NECK",
            age="79",
            gender="FEMALE",
            itch="True",
        ),
    )


def ham_layout(folder: Path) -> None:
    a, b, c = NAMES
    write_images(folder, f"HAM10000_images_part_1/{a}.jpg", *(f"HAM10000_images_part_2/{name}.jpg" for name in (b, c)))
    write_table(
        folder / "HAM10000_metadata.csv",
        rows(
            {"lesion_id": "HAM_1", "image_id": a},
            {"lesion_id": "HAM_1", "image_id": b},
            {"lesion_id": "HAM_2", "image_id": c, "dx": "", "age": "", "sex": "unknown", "localization": "unknown"},
            dx="bkl",
            dx_type="histo",
            age="80.0",
            sex="male",
            localization="scalp",
        ),
    )


def isic_layout(folder: Path) -> None:
    a, b, c = NAMES
    write_images(folder, *(f"images/{name}.jpg" for name in NAMES))
    blank = {f"diagnosis_{level}": "" for level in range(1, 5)} | {
        **{"age_approx": "", "sex": "", "anatom_site_general": "", "fitzpatrick_skin_type": "", "lesion_id": ""}
    }
    write_table(
        folder / "metadata.csv",
        rows(
            {"isic_id": a},
            {"isic_id": b, "diagnosis_4": ""},
            {"isic_id": c, **blank},
            attribution="a hospital",
            age_approx="55",
            anatom_site_general="head/neck",
            diagnosis_1="Benign",
            diagnosis_2="Benign melanocytic proliferations",
            diagnosis_3="Nevus",
            diagnosis_4="Nevus, NOS, Compound",
            fitzpatrick_skin_type="II",
            image_type="dermoscopic",
            lesion_id="IL_1",
            sex="female",
        ),
    )


FITZPATRICK = {
    "fitzpatrick_scale": "5",
    "fitzpatrick_centaur": "6",
    "label": "malignant melanoma",
    "nine_partition_label": "malignant melanoma",
    "three_partition_label": "malignant",
    "qc": "",
    "url": "https://www.dermaamin.com/site/images/a.jpg",
    "url_alphanum": "a.jpg",
}


def fitzpatrick_layout(folder: Path) -> None:
    write_images(folder, *(f"finalfitz17k/{name}.jpg" for name in NAMES))
    a, b, c = NAMES
    blank = {"fitzpatrick_scale": "-1", "label": "", "nine_partition_label": "", "three_partition_label": ""}
    write_table(
        folder / "fitzpatrick17k.csv", rows({"md5hash": a}, {"md5hash": b}, {"md5hash": c, **blank}, **FITZPATRICK)
    )


def derm7pt_layout(folder: Path) -> None:
    a, b, c = NAMES
    write_images(folder, *(f"images/NEL/{kind}{name}.jpg" for name in NAMES for kind in ("c", "d")))

    def paths(name: str) -> Row:
        return {"clinic": f"NEL/c{name}.jpg", "derm": f"NEL/d{name}.jpg"}

    absent = dict.fromkeys(("streaks", "pigmentation", "regression_structures", "dots_and_globules"), "absent")
    write_table(
        folder / "meta" / "meta.csv",
        rows(
            {"case_num": "1", **paths(a)},
            {"case_num": "2", **paths(b), "diagnosis": "clark nevus"},
            {"case_num": "3", **paths(c), "diagnosis": "", "location": "", "sex": "", "pigment_network": "absent"},
            diagnosis="melanoma (in situ)",
            seven_point_score="3",
            pigment_network="atypical",
            **absent,
            blue_whitish_veil="present",
            vascular_structures="absent",
            location="back",
            sex="female",
            case_id="",
            notes="",
        ),
    )
    for number, kind in enumerate(("train", "valid", "test")):
        write_table(folder / "meta" / f"{kind}_indexes.csv", [{"indexes": str(number)}])


def skincon_layout(folder: Path) -> None:
    write_images(folder, *(f"images/{name}.jpg" for name in NAMES))
    a, b, c = (f"{name}.jpg" for name in NAMES)
    write_table(
        folder / "annotations_fitzpatrick17k.csv",
        rows(
            {"": "0", "ImageID": a},
            {"": "1", "ImageID": b, "Flat topped": "1"},
            {"": "2", "ImageID": c},
            {"": "3", "ImageID": "rejected.jpg", REJECTED: "1"},
            Papule="1",
            **{"Flat topped": "0", "Brown(Hyperpigmentation)": "1", REJECTED: "0"},
        ),
    )
    write_table(folder / "fitzpatrick17k.csv", [{"md5hash": name, **FITZPATRICK} for name in NAMES[:2]])


def skincap_layout(folder: Path) -> None:
    write_images(folder, *(f"skincap/{name}.png" for name in NAMES))
    a, b, c = (f"{name}.png" for name in NAMES)
    write_table(
        folder / "skincap_v240623.csv",
        rows(
            {"id": "1", "skincap_file_path": a},
            {"id": "2", "skincap_file_path": b, "Papule": "0"},
            {"id": "3", "skincap_file_path": c, "disease": "", "fitzpatrick_scale": ""},
            {"id": "4", "skincap_file_path": "rejected.png", REJECTED: "1"},
            ori_file_path="fitz/a.jpg",
            disease="Psoriasis",
            caption_zh="红斑",
            caption_zh_polish_en="A red patch.",
            fitzpatrick_scale="3",
            Papule="1",
            **{REJECTED: "0"},
        ),
    )


def image_folder_layout(folder: Path) -> None:
    write_images(folder, "psoriasis/皮肤 图_1.jpg", "eczema/hand_eczema/b.jpg", "c.jpg")
    (folder / "README.md").write_text("no image", encoding="utf-8")


def write_samples(file: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    with tarfile.open(file, "w") as archive:
        for key, parts in samples.items():
            for ending, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def webdataset_layout(folder: Path) -> None:
    def document(**fields: object) -> bytes:
        return json.dumps(fields).encode()

    said = {"label": "psoriasis", "patient_id": "p", "age": 40, "sex": "male", "skin_type": 2, "width": 48}
    silent = {"labels": ["unknown"], "age": "N/A", "sex": "None", "body_site": "", "skin_type": None}
    write_samples(
        folder / "shard 皮肤-0.tar",
        {
            "folder/a": {"jpg": photograph(0, 48, 40), "txt": b" a  caption\n", "json": document(**said)},
            "folder/b": {"txt": "标题".encode(), "JPG": photograph(1, 48, 40), "json": document(**said)},
        },
    )
    write_samples(
        folder / "shard-1.tar", {"c": {"json": document(**silent), "txt": b"c", "png": photograph(2, 48, 40)}}
    )


def parquet_layout(folder: Path) -> None:
    """As `datasets` writes image data sets: structs of bytes and path, and class labels as numbers."""
    names = ["psoriasis", "eczema"]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    kinds = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()}
    strings = ("caption", "patient_id", "sex", "age", "skin_type", "id")
    schema = pa.schema({**kinds, **dict.fromkeys(strings, pa.string())}, metadata=metadata)
    said = {"label": 0, "caption": "a caption", "patient_id": "p", "sex": "male", "age": "40", "skin_type": "II"}
    silent = {"label": None, "caption": "c", "patient_id": None, "sex": "None", "age": "unknown", "skin_type": "-1"}
    rows = [
        {"image": {"bytes": photograph(number, 48, 40), "path": f"{name}.jpg"}, "id": name, **fields}
        for number, (name, fields) in enumerate(zip(NAMES, (said, said, silent), strict=True))
    ]
    (folder / "data").mkdir()
    for number, part in enumerate((rows[:2], rows[2:])):
        file = folder / "data" / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema), file, row_group_size=1, use_dictionary=False)


LAYOUTS = {
    "csv": Layout(
        csv_layout,
        [f"images/{name}.jpg" for name in NAMES],
        "psoriasis",
        "images/c.jpg",
        "metadata.csv",
        "image",
        ("images/皮肤 图_1.jpg", "images/b.jpg"),
    ),
    "derm1m": Layout(
        derm1m_layout,
        DERM1M_IMAGES,
        "psoriasis",
        "public/c.jpg",
        "Derm1M_v2_pretrain.csv",
        "truncated_caption",
        (DERM1M_IMAGES[0], DERM1M_IMAGES[1]),
        ("youtube", "public"),
    ),
    "make_table": Layout(
        make_layout,
        ["textbook/皮肤 图_00384_19121.png", "textbook/皮肤 图_00384_19122.png", "public/c.jpg"],
        "psoriasis",
        "public/c.jpg",
        "MAKE_train.csv",
        "knowledge_masks",
        ("textbook/皮肤 图_00384_19121.png", "textbook/皮肤 图_00384_19122.png"),
        ("textbook", "public"),
    ),
    "derm1m_agentaug": Layout(
        agentaug_layout,
        AGENTAUG_IMAGES,
        "psoriasis",
        AGENTAUG_IMAGES[2],
        "MAGEN_train.csv",
        "ontology_label",
        (AGENTAUG_IMAGES[0], AGENTAUG_IMAGES[1]),
        ("images",),
    ),
    "pad_ufes_20": Layout(
        pad_layout,
        [f"{name}.png" for name in NAMES],
        "basal cell carcinoma",
        "c.png",
        "metadata.csv",
        "diagnostic",
        ("皮肤 图_1.png", "b.png"),
        ("images",),
    ),
    "ham10000": Layout(
        ham_layout,
        NAMES,
        "benign keratosis",
        "c",
        "HAM10000_metadata.csv",
        "dx",
        (NAMES[0], "b"),
        ("HAM10000_images_part_1", "HAM10000_images_part_2"),
    ),
    "isic": Layout(
        isic_layout, NAMES, "Nevus NOS Compound", "c", "metadata.csv", "isic_id", (NAMES[0], "b"), ("images",)
    ),
    "fitzpatrick17k": Layout(
        fitzpatrick_layout,
        NAMES,
        "malignant melanoma",
        "c",
        "fitzpatrick17k.csv",
        "md5hash",
        images=("finalfitz17k",),
    ),
    "derm7pt": Layout(
        derm7pt_layout,
        [f"{case}-{kind}" for case in (1, 2, 3) for kind in ("derm", "clinic")],
        "melanoma (in situ)",
        "3-derm",
        "meta/meta.csv",
        "pigment_network",
        ("1-derm", "1-clinic"),
        ("images",),
    ),
    "parquet": Layout(
        parquet_layout,
        PARQUET_IDS,
        "psoriasis",
        PARQUET_IDS[2],
        together=(PARQUET_IDS[0], PARQUET_IDS[1]),
    ),
    "skincon": Layout(
        skincon_layout,
        [f"{name}.jpg" for name in NAMES],
        "malignant melanoma",
        "c.jpg",
        "annotations_fitzpatrick17k.csv",
        "ImageID",
        images=("images",),
    ),
    "skincap": Layout(
        skincap_layout,
        ["1", "2", "3"],
        "psoriasis",
        "3",
        "skincap_v240623.csv",
        "caption_zh_polish_en",
        images=("skincap",),
    ),
    "image_folder": Layout(
        image_folder_layout,
        ["c.jpg", "eczema/hand_eczema/b.jpg", "psoriasis/皮肤 图_1.jpg"],
        "psoriasis",
        "c.jpg",
    ),
    "webdataset": Layout(
        webdataset_layout,
        ["shard 皮肤-0.tar!/folder/a", "shard 皮肤-0.tar!/folder/b", "shard-1.tar!/c"],
        "psoriasis",
        "shard-1.tar!/c",
        together=("shard 皮肤-0.tar!/folder/a", "shard 皮肤-0.tar!/folder/b"),
    ),
}
