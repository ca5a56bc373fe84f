"""A hub that cannot be reached: the cache is read at once, and a missing name is said within a second."""

import socket
import time

import pytest
from huggingface_hub import constants, is_offline_mode

from hub_server import HubServer
from rlcs.data.hub import cache_where_unreachable, is_reachable
from rlcs.data.sources import open_table
from rlcs.errors import DataError, ModelError
from rlcs.model.loading import load
from rlcs.recipe.schema import Data, Model

PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@pytest.fixture
def no_hub(monkeypatch):
    """No proxy, and nothing at the address of the hub."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    return address


def test_a_hub_is_reachable_where_something_listens(no_hub, monkeypatch):
    assert not is_reachable()
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert is_reachable()


def test_behind_a_proxy_the_hub_is_taken_to_be_reachable(no_hub, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert is_reachable()


def test_only_the_cache_is_read_and_only_for_that_long(no_hub):
    before = constants.HF_HUB_OFFLINE
    with cache_where_unreachable("nobody/nothing"):
        assert is_offline_mode()
    assert before == constants.HF_HUB_OFFLINE


def test_what_lies_on_the_disk_needs_no_hub(no_hub, tmp_path):
    with cache_where_unreachable(str(tmp_path)):
        assert not is_offline_mode()


@pytest.mark.parametrize("attempt", ["model", "data"])
def test_a_name_that_is_not_in_the_cache_is_said_without_further_attempts(no_hub, attempt, capfd):
    started = time.monotonic()
    with pytest.raises((ModelError, DataError), match=r"nobody/nothing"):
        if attempt == "model":
            load(Model(name="nobody/nothing"))
        else:
            open_table("nobody/nothing", Data(), "rl")
    assert time.monotonic() - started < 10, "five further attempts take 23 seconds"
    assert "Retry" not in capfd.readouterr().err
