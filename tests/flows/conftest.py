"""What tests of launchers share: latents to train on, and what a run makes of them in peace."""

import chain
import pytest
from waiting import UPDATES

from eqm.records import Record


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.mktemp("clusters") / "store", UPDATES, until="latents")


@pytest.fixture(scope="session")
def expected(latents: chain.Chain, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The record of a run that nothing disturbed."""
    store = chain.copied(latents, tmp_path_factory.mktemp("undisturbed") / "store", without=())
    return chain.run(chain.job(latents.config, store, "train", latents.records))
