"""The infections of the synthetic corpus; see `conditions`."""

from __future__ import annotations

from dermray.corpus.synthetic.condition import BACTERIAL, FUNGAL, INFECTIOUS, TRUNK, VIRAL, Condition
from dermray.corpus.synthetic.lesions import LesionGroup

# One line holds what belongs together; the formatter would give every argument its own.
# fmt: off
FUNGAL_INFECTIONS = (
    Condition(
        name="tinea corporis", path=(*FUNGAL, "tinea corporis"),
        morphology="annular plaque", colour="red", border="active scaly", scale="fine scale",
        distribution="one or two",
        sites=("arm", "leg", "abdomen", "back", "neck"), concepts=("annular", "erythema", "plaque"),
        groups=(
            LesionGroup(
                "few", count=(1, 2), radius=(0.24, 0.33), wobble=0.16, hollow=0.85, blood=(0.75, 1.0),
                plateau=0.06, surface=("scaly border",),
            ),
        ),
        synonyms=("ringworm of the body",), symptoms=("itching",), ages=(4, 70),
    ),
    Condition(
        name="pityriasis versicolor", path=(*FUNGAL, "pityriasis versicolor"),
        morphology="macule", colour="tan", border="irregular", scale="fine scale", distribution="scattered",
        sites=TRUNK, concepts=("macule", "scattered", "brown(hyperpigmentation)"),
        groups=(
            LesionGroup(
                "scattered", count=(16, 28), radius=(0.045, 0.095), wobble=0.75, softness=0.16,
                blood=(0.02, 0.08), melanin=(0.32, 0.5), surface=("fine scale",),
            ),
        ),
        synonyms=("tinea versicolor",), ages=(14, 55),
    ),
    Condition(
        name="candidal intertrigo", path=(*FUNGAL, "candidal intertrigo"),
        morphology="patch", colour="beefy red", border="ill-defined", scale="no scale",
        distribution="in a skin fold with satellites",
        sites=("groin", "armpit"), concepts=("red", "patch", "erosion", "satellite papules"),
        groups=(
            LesionGroup(
                "single", radius=(0.24, 0.32), aspect=(1.7, 2.3), wobble=0.35, aligned=True, blood=(1.0, 1.3),
                gloss=0.25, surface=("skin fold",),
            ),
            LesionGroup("around", count=(10, 18), radius=(0.018, 0.032), blood=(0.9, 1.1), dome=0.5),
        ),
        synonyms=("intertriginous candidiasis",), symptoms=("itching", "tender"), ages=(1, 85),
    ),
)

OTHER_INFECTIONS = (
    Condition(
        name="impetigo", path=(*BACTERIAL, "impetigo"),
        morphology="crusted erosion", colour="honey-yellow", border="irregular", scale="thick crust",
        distribution="clustered",
        sites=("chin", "nose", "cheek", "arm"), concepts=("erosion", "crusted", "red"),
        groups=(
            LesionGroup(
                "few", count=(3, 6), radius=(0.1, 0.17), wobble=0.6, softness=0.2, blood=(0.5, 0.8),
                surface=("honey crust",),
            ),
        ),
        symptoms=("exudate", "itching"), ages=(1, 14),
    ),
    Condition(
        name="cellulitis", path=(*BACTERIAL, "cellulitis"),
        morphology="swollen patch", colour="red", border="diffuse", scale="no scale", distribution="diffuse",
        sites=("leg", "foot", "ankle"), concepts=("erythema", "diffuse", "induration", "red"),
        groups=(
            LesionGroup(
                "single", radius=(0.4, 0.5), aspect=(1.0, 1.4), wobble=0.4, softness=0.55, blood=(0.75, 1.0),
                dome=0.12, gloss=0.25,
            ),
        ),
        symptoms=("tender", "fever"), ages=(25, 85),
    ),
    Condition(
        name="folliculitis", path=(*BACTERIAL, "folliculitis"),
        morphology="pustule", colour="yellow on red", border="well-defined", scale="no scale",
        distribution="scattered around hair follicles",
        sites=("thigh", "buttocks", "chest", "back"), concepts=("papule", "scattered"),
        groups=(
            LesionGroup(
                "scattered", count=(10, 16), radius=(0.045, 0.062), softness=0.4, blood=(0.7, 1.0), dome=0.3,
                surface=("pus", "follicle hair"),
            ),
        ),
        symptoms=("itching", "tender"), ages=(14, 60),
    ),
    Condition(
        name="herpes zoster", path=(*VIRAL, "herpes zoster"),
        morphology="vesicle", colour="red", border="well-defined", scale="no scale",
        distribution="in a dermatomal band",
        sites=("chest", "back", "flank", "abdomen"), concepts=("grouped", "erythema", "linear"),
        groups=(
            LesionGroup(
                "band", count=(6, 9), radius=(0.11, 0.15), wobble=0.5, softness=0.3, blood=(0.7, 0.95),
                plateau=0.04,
            ),
            LesionGroup("inside", count=(26, 40), radius=(0.02, 0.032), surface=("clear fluid",)),
        ),
        synonyms=("shingles",), symptoms=("tender", "burning"), sometimes=(("haemorrhagic crust", 0.3),),
        ages=(40, 88),
    ),
    Condition(
        name="viral wart", path=(*VIRAL, "viral wart"),
        morphology="verrucous papule", colour="grey-brown", border="sharp", scale="hyperkeratotic",
        distribution="solitary",
        sites=("finger", "hand", "foot", "knee"), concepts=("papule", "raised", "gray"),
        groups=(
            LesionGroup(
                "few", count=(1, 2), radius=(0.15, 0.22), wobble=0.25, softness=0.06, plateau=0.35,
                surface=("warty", "black dots"),
            ),
        ),
        synonyms=("verruca vulgaris",), ages=(5, 40),
    ),
    Condition(
        name="molluscum contagiosum", path=(*VIRAL, "molluscum contagiosum"),
        morphology="dome-shaped papule", colour="pearly pink", border="well-defined", scale="no scale",
        distribution="multiple",
        sites=("chest", "arm", "armpit", "abdomen"), concepts=("papule", "smooth", "pink"),
        groups=(
            LesionGroup(
                "few", count=(6, 11), radius=(0.055, 0.085), aspect=(1.0, 1.1), wobble=0.06, softness=0.08,
                dome=0.75, surface=("pearly", "umbilication"),
            ),
        ),
        ages=(2, 30),
    ),
    Condition(
        name="cutaneous larva migrans", path=(*INFECTIOUS, "parasitic", "cutaneous larva migrans"),
        morphology="serpiginous track", colour="red", border="raised", scale="no scale",
        distribution="linear",
        sites=("foot", "buttocks", "leg"), concepts=("burrow", "serpiginous", "erythema"),
        groups=(
            LesionGroup(
                "track", radius=(0.018, 0.026), wobble=0.4, softness=0.35, blood=(1.0, 1.4), dome=0.9,
            ),
        ),
        synonyms=("creeping eruption",), symptoms=("itching",), ages=(5, 60),
    ),
)
