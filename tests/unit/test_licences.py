from __future__ import annotations

import pytest

from dermray.corpus.licences import CommercialUse, commercial_use, of_corpus
from dermray.corpus.manifest import Manifest, Shard


@pytest.mark.parametrize(
    ("names", "use"),
    [
        (["CC-BY-NC-4.0"], CommercialUse.FORBIDDEN),
        (["CC BY 4.0", "CC BY-NC-SA 3.0"], CommercialUse.FORBIDDEN),
        (["CC-BY-4.0"], CommercialUse.ALLOWED),
        (["Apache-2.0", "INC-1.0", "CC0-1.0"], CommercialUse.ALLOWED),
        (["CC-BY-4.0", None], CommercialUse.UNKNOWN),
        ([None, "non-commercial research only"], CommercialUse.FORBIDDEN),
        ([], CommercialUse.UNKNOWN),
    ],
)
def test_one_licence_that_forbids_it_forbids_it_for_all(names, use):
    assert commercial_use(names) is use


def test_a_corpus_that_names_none_is_not_taken_for_free():
    shard = Shard(path="a", split="train", num_samples=1, num_bytes=1, sha256="0", row_groups=(1,))
    assert of_corpus(Manifest(shards=(shard,))) == (None,)
    named = Manifest(shards=(shard,), provenance={"licences": ["CC-BY-NC-4.0", None]})
    assert of_corpus(named) == ("CC-BY-NC-4.0", None)
