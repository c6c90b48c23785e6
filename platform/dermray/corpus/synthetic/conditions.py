"""The diseases of the synthetic corpus: where each stands in the tree, and what makes it look as it does.

A condition is data. Words for captions and numbers for the drawing stand side by side, so that what a caption
says is what the picture shows. Medical detail is of textbook grade: enough to tell the conditions apart, not
for clinical use.
"""

from __future__ import annotations

from dermray.corpus.synthetic.condition import (
    BENIGN,
    ECZEMA,
    EXTENSOR,
    LIGHT_TYPES,
    MALIGNANT,
    NON_INFECTIOUS,
    PAPULOSQUAMOUS,
    PIGMENTARY,
    TRUNK,
    Condition,
)
from dermray.corpus.synthetic.infections import FUNGAL_INFECTIONS, OTHER_INFECTIONS
from dermray.corpus.synthetic.lesions import LesionGroup

# One line holds what belongs together; the formatter would give every argument its own.
# fmt: off
INFLAMMATORY = (
    Condition(
        name="psoriasis", path=(*PAPULOSQUAMOUS, "psoriasis"),
        morphology="plaque", colour="salmon-red", border="sharp", scale="thick silvery scale",
        distribution="localized",
        sites=EXTENSOR, concepts=("plaque", "red", "well-defined"),
        groups=(
            LesionGroup(
                "few", count=(1, 3), radius=(0.19, 0.3), wobble=0.4, softness=0.06, blood=(0.8, 1.1),
                plateau=0.12, surface=("silvery scale",),
            ),
        ),
        synonyms=("plaque psoriasis",), symptoms=("itching",),
    ),
    Condition(
        name="lichen planus", path=(*PAPULOSQUAMOUS, "lichen planus"),
        morphology="flat-topped papule", colour="violaceous", border="polygonal", scale="fine white lines",
        distribution="grouped",
        sites=("wrist", "forearm", "ankle", "back"), concepts=("papule", "violaceous", "grouped"),
        groups=(
            LesionGroup(
                "grouped", count=(12, 20), radius=(0.05, 0.085), wobble=0.4, softness=0.1,
                tint=((0.5, 0.26, 0.47), 0.72), plateau=0.3, gloss=0.2, surface=("wickham striae",),
            ),
        ),
        symptoms=("itching",), ages=(25, 75),
    ),
    Condition(
        name="atopic dermatitis", path=(*ECZEMA, "atopic dermatitis"),
        morphology="lichenified patch", colour="dusky red-brown", border="ill-defined", scale="dry scale",
        distribution="flexural",
        sites=("elbow", "knee", "neck", "wrist"), concepts=("patch", "erythema", "xerosis"),
        groups=(
            LesionGroup(
                "few", count=(1, 2), radius=(0.3, 0.4), wobble=0.5, softness=0.45, blood=(0.4, 0.6),
                melanin=(0.2, 0.35), surface=("lichenification",),
            ),
        ),
        synonyms=("atopic eczema",), symptoms=("itching",), sometimes=(("excoriation", 0.65),), ages=(1, 45),
    ),
    Condition(
        name="allergic contact dermatitis", path=(*ECZEMA, "allergic contact dermatitis"),
        morphology="geometric vesicular patch", colour="bright red", border="straight-edged",
        scale="no scale", distribution="at the site of contact",
        sites=("forearm", "abdomen", "back", "chest"), concepts=("patch", "erythema", "well-defined", "red"),
        groups=(
            LesionGroup(
                "single", radius=(0.26, 0.33), aspect=(1.0, 1.9), wobble=0.06, softness=0.05, square=True,
                blood=(0.9, 1.2), plateau=0.03,
            ),
            LesionGroup("inside", count=(14, 24), radius=(0.018, 0.028), surface=("clear fluid",)),
        ),
        synonyms=("contact allergy",), symptoms=("itching", "burning"), sometimes=(("excoriation", 0.3),),
    ),
    Condition(
        name="urticaria", path=(*NON_INFECTIOUS, "urticaria"),
        morphology="wheal", colour="pale pink", border="raised", scale="no scale", distribution="widespread",
        sites=(*TRUNK, "arm", "thigh"), concepts=("erythema", "pink", "smooth"),
        groups=(
            LesionGroup(
                "few", count=(5, 9), radius=(0.11, 0.19), aspect=(1.0, 1.7), wobble=0.7, softness=0.2,
                blood=(0.25, 0.4), plateau=0.09, gloss=0.15, surface=("wheal",),
            ),
        ),
        synonyms=("hives",), symptoms=("itching",), ages=(5, 70),
    ),
    Condition(
        name="bullous pemphigoid", path=(*NON_INFECTIOUS, "bullous disease", "bullous pemphigoid"),
        morphology="tense bulla", colour="amber on red", border="well-defined", scale="no scale",
        distribution="multiple",
        sites=("arm", "leg", "thigh", "abdomen"), concepts=("erythema", "red", "fluid-containing"),
        groups=(
            LesionGroup(
                "few", count=(4, 7), radius=(0.1, 0.15), wobble=0.08, softness=0.3, blood=(0.5, 0.8),
                surface=("tense blister",),
            ),
            LesionGroup(
                "around", count=(1, 3), radius=(0.06, 0.1), wobble=0.5, softness=0.3, blood=(0.7, 1.0),
            ),
        ),
        symptoms=("itching", "tender"), sometimes=(("haemorrhagic crust", 0.2),), ages=(55, 92),
    ),
    Condition(
        name="erythema multiforme", path=(*NON_INFECTIOUS, "erythema multiforme"),
        morphology="target lesion", colour="red and dusky", border="regular", scale="no scale",
        distribution="multiple",
        sites=("hand", "forearm", "arm", "leg"), concepts=("erythema", "round", "macule"),
        groups=(
            LesionGroup(
                "few", count=(5, 9), radius=(0.1, 0.145), aspect=(1.0, 1.15), wobble=0.1, softness=0.1,
                blood=(0.25, 0.4), surface=("target rings",),
            ),
        ),
        symptoms=("tender",), ages=(10, 60),
    ),
    Condition(
        name="rosacea", path=(*NON_INFECTIOUS, "rosacea"),
        morphology="flushed patch", colour="red", border="diffuse", scale="no scale",
        distribution="symmetric on both cheeks",
        sites=("cheek", "face"), concepts=("erythema", "papule", "symmetric"),
        groups=(
            LesionGroup(
                "symmetric", count=(2, 2), radius=(0.24, 0.3), wobble=0.3, softness=0.4, blood=(0.7, 1.0),
                surface=("telangiectasia",),
            ),
            LesionGroup(
                "inside", count=(8, 14), radius=(0.02, 0.032), softness=0.3, blood=(0.5, 0.8), dome=0.6,
            ),
        ),
        symptoms=("burning",), skin_types=(1, 2, 3, 4), ages=(28, 70),
    ),
    Condition(
        name="vitiligo", path=(*PIGMENTARY, "vitiligo"),
        morphology="depigmented patch", colour="white", border="sharp", scale="no scale",
        distribution="localized",
        sites=("hand", "knee", "abdomen", "neck"),
        concepts=("white(hypopigmentation)", "patch", "well-defined"),
        groups=(
            LesionGroup(
                "few", count=(1, 3), radius=(0.2, 0.31), wobble=0.6, softness=0.06, pallor=(0.85, 1.0),
            ),
        ),
        skin_types=(3, 4, 5, 6), ages=(5, 60),
    ),
    Condition(
        name="melasma", path=(*PIGMENTARY, "melasma"),
        morphology="hyperpigmented patch", colour="brown", border="irregular", scale="no scale",
        distribution="symmetric on both cheeks",
        sites=("cheek", "face"), concepts=("brown(hyperpigmentation)", "patch", "symmetric"),
        groups=(
            LesionGroup(
                "symmetric", count=(2, 2), radius=(0.24, 0.3), wobble=0.75, softness=0.2, melanin=(0.6, 0.9),
            ),
        ),
        synonyms=("chloasma",), skin_types=(2, 3, 4, 5), ages=(22, 55),
    ),
    Condition(
        name="leukocytoclastic vasculitis",
        path=(*NON_INFECTIOUS, "vasculitis", "leukocytoclastic vasculitis"),
        morphology="palpable purpura", colour="dark purple", border="well-defined", scale="no scale",
        distribution="scattered",
        sites=("leg", "ankle", "foot"), concepts=("purpura/petechiae", "purple", "scattered"),
        groups=(
            LesionGroup(
                "scattered", count=(26, 44), radius=(0.018, 0.042), wobble=0.3, softness=0.2,
                tint=((0.33, 0.05, 0.15), 0.85), dome=0.25,
            ),
        ),
        symptoms=("burning", "tender"), ages=(8, 80),
    ),
)

PROLIFERATIONS = (
    Condition(
        name="melanocytic nevus", path=(*BENIGN, "benign melanocytic lesion", "melanocytic nevus"),
        morphology="pigmented papule", colour="uniform brown", border="regular", scale="no scale",
        distribution="solitary",
        sites=(*TRUNK, "arm", "face"), concepts=("pigmented", "macule", "round", "symmetric"),
        groups=(
            LesionGroup(
                "single", radius=(0.12, 0.18), aspect=(1.0, 1.2), wobble=0.08, tint=((0.22, 0.115, 0.075), 0.88),
                dome=0.18,
            ),
        ),
        synonyms=("mole",), ages=(5, 60),
    ),
    Condition(
        name="seborrheic keratosis", path=(*BENIGN, "benign keratinocytic lesion", "seborrheic keratosis"),
        morphology="stuck-on plaque", colour="waxy tan-brown", border="sharp", scale="greasy scale",
        distribution="one to three",
        sites=(*TRUNK, "face"), concepts=("plaque", "brown(hyperpigmentation)", "raised"),
        groups=(
            LesionGroup(
                "few", count=(1, 3), radius=(0.17, 0.25), wobble=0.3, softness=0.05,
                tint=((0.5, 0.34, 0.2), 0.88), plateau=0.25, gloss=0.12, surface=("horn cysts",),
            ),
        ),
        synonyms=("senile wart",), symptoms=("itching",), ages=(45, 90),
    ),
    Condition(
        name="infantile hemangioma", path=(*BENIGN, "benign vascular lesion", "infantile hemangioma"),
        morphology="lobulated nodule", colour="bright crimson", border="sharp", scale="no scale",
        distribution="solitary",
        sites=("face", "scalp edge", "chest", "arm"), concepts=("nodule", "red", "raised"),
        groups=(
            LesionGroup(
                "single", radius=(0.22, 0.31), wobble=0.4, softness=0.07, tint=((0.78, 0.05, 0.14), 0.88),
                dome=0.25, gloss=0.2, surface=("lobules",),
            ),
        ),
        synonyms=("strawberry mark",), symptoms=("increasing size",), ages=(0, 3),
    ),
    Condition(
        name="keloid", path=(*BENIGN, "benign fibrous lesion", "keloid"),
        morphology="firm raised scar", colour="shiny pink-brown", border="sharp", scale="no scale",
        distribution="linear",
        sites=("chest", "shoulder", "ear", "neck"), concepts=("scar", "raised", "smooth", "linear"),
        groups=(
            LesionGroup(
                "single", radius=(0.18, 0.22), aspect=(3.5, 5.5), wobble=0.3, softness=0.1,
                tint=((0.8, 0.45, 0.42), 0.6), dome=0.6, gloss=0.6,
            ),
        ),
        synonyms=("keloid scar",), symptoms=("itching", "tender"), ages=(12, 50),
    ),
    Condition(
        name="melanoma", path=(*MALIGNANT, "malignant melanocytic lesion", "melanoma"),
        morphology="asymmetric pigmented lesion", colour="black and brown with blue-grey",
        border="irregular notched", scale="no scale", distribution="solitary",
        sites=("back", "leg", "arm", "chest"),
        concepts=("pigmented", "irregular", "brown(hyperpigmentation)"),
        groups=(
            LesionGroup(
                "single", radius=(0.23, 0.32), aspect=(1.1, 1.6), wobble=0.6, softness=0.07,
                tint=((0.27, 0.14, 0.09), 0.92), dome=0.1, surface=("variegated pigment",),
            ),
        ),
        synonyms=("malignant melanoma",), symptoms=("increasing size", "bleeding"),
        sometimes=(("regression", 0.4),), ages=(30, 85),
    ),
    Condition(
        name="basal cell carcinoma", path=(*MALIGNANT, "keratinocyte carcinoma", "basal cell carcinoma"),
        morphology="pearly nodule", colour="translucent pink", border="rolled", scale="no scale",
        distribution="solitary",
        sites=("nose", "cheek", "forehead", "ear"), concepts=("nodule", "smooth", "pink"),
        groups=(
            LesionGroup(
                "single", radius=(0.19, 0.26), aspect=(1.0, 1.25), wobble=0.18, softness=0.07,
                blood=(0.25, 0.4), dome=0.55, surface=("pearly", "telangiectasia", "central ulcer"),
            ),
        ),
        synonyms=("rodent ulcer",), symptoms=("bleeding", "nontender"), skin_types=(1, 2, 3, 4),
        ages=(45, 90),
    ),
    Condition(
        name="squamous cell carcinoma",
        path=(*MALIGNANT, "keratinocyte carcinoma", "squamous cell carcinoma"),
        morphology="indurated nodule", colour="red with a yellow-brown core", border="heaped-up",
        scale="keratin plug", distribution="solitary",
        sites=("ear", "lip", "hand", "scalp edge"), concepts=("nodule", "tumor", "induration"),
        groups=(
            LesionGroup(
                "single", radius=(0.22, 0.3), wobble=0.35, softness=0.09, blood=(0.9, 1.2), dome=0.5,
                surface=("keratin plug",),
            ),
        ),
        symptoms=("tender", "increasing size", "bleeding"), ages=(50, 92),
    ),
)

OTHERS = (
    Condition(
        name="venous ulcer", path=("reaction patterns", "ulcer", "venous ulcer"),
        morphology="ulcer", colour="red and yellow", border="punched-out", scale="no scale",
        distribution="solitary",
        sites=("leg", "ankle"), concepts=("ulcer", "brown(hyperpigmentation)", "red"),
        groups=(
            LesionGroup(
                "single", radius=(0.4, 0.48), wobble=0.4, softness=0.45, blood=(0.15, 0.3),
                melanin=(0.5, 0.75),
            ),
            LesionGroup("single", radius=(0.22, 0.31), wobble=0.5, softness=0.06, surface=("slough",)),
        ),
        synonyms=("stasis ulcer",), symptoms=("exudate", "tender"), ages=(45, 90),
    ),
    Condition(
        name="sunburn", path=("exogenous", "sunburn"),
        morphology="confluent erythema", colour="bright red", border="straight", scale="no scale",
        distribution="widespread with spared strap lines",
        sites=("shoulder", "back", "chest"), concepts=("erythema", "diffuse"),
        groups=(
            LesionGroup("whole", surface=("strap marks",)),
        ),
        symptoms=("tender", "burning"), skin_types=LIGHT_TYPES, ages=(6, 60),
    ),
    Condition(
        name="ichthyosis vulgaris", path=("hereditary", "ichthyosis", "ichthyosis vulgaris"),
        morphology="plate-like scale", colour="grey-brown", border="ill-defined", scale="fish-like scale",
        distribution="generalized",
        sites=("leg", "arm", "abdomen"), concepts=("generalized", "desquamation"),
        groups=(
            LesionGroup("whole", surface=("fish scale",)),
        ),
        symptoms=("itching",), ages=(2, 60),
    ),
    Condition(
        name="alopecia areata", path=("hair diseases", "alopecia areata"),
        morphology="bald patch", colour="skin-coloured", border="round", scale="no scale",
        distribution="one or two",
        sites=("scalp",), concepts=("patch", "round", "well-defined"),
        groups=(
            LesionGroup(
                "few", count=(1, 2), radius=(0.2, 0.29), aspect=(1.0, 1.25), wobble=0.15,
                surface=("bald patch",),
            ),
        ),
        synonyms=("patchy hair loss",), ages=(6, 55),
    ),
)

CONDITIONS: tuple[Condition, ...] = (
    *FUNGAL_INFECTIONS,
    *OTHER_INFECTIONS,
    *INFLAMMATORY,
    *PROLIFERATIONS,
    *OTHERS,
)


def ontology() -> dict[str, list[str]]:
    """The disease tree in the layout of Derm1M's `ontology.json`: node name -> names of its children, from "root".

    A leaf's node name lists its synonyms after commas.
    """
    tree: dict[str, list[str]] = {"root": []}
    for condition in CONDITIONS:
        nodes = (*condition.path[:-1], condition.node)
        for parent, child in zip(("root", *nodes), nodes, strict=False):
            children = tree.setdefault(parent, [])
            if child not in children:
                children.append(child)
        tree[condition.node] = []
    return tree
