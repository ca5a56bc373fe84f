"""`rlcs serve` under attack: thousands of malformed requests, and neighbours who must not notice."""

import pytest

from bench.hostile import KEY, Footprint, Seen, attack, attack_from_clients, serving

FLAT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32", "MALLOC_ARENA_MAX": "1"}
"""Otherwise oneDNN keeps a compiled product for each of the last thousand shapes."""
ALLOWED = {200, 307, 400, 401, 404, 405, 415}
"""What malformed requests are answered with, and valid ones among them: no failures, no 429."""


@pytest.mark.fault(
    "server",
    "hostile requests: malformed JSON, images, addresses, settings, heads and keys; connections that are "
    "cut, half closed, silent or never read",
    "refused in OpenAI's form; neighbours' answers unchanged, health green, memory flat",
)
def test_hostile_requests_hurt_nobody(random_model_folder, record_property, pytestconfig):
    warm, requests = (60, 10_000) if pytestconfig.getoption("every_kill") else (20, 100)
    with serving(random_model_folder, env={"RLCS_API_KEY": KEY, **FLAT}) as server:
        attack(server.port, 1000, warm, Seen())  # what is loaded once, is loaded now
        before = Footprint.of(server)
        seen, neighbour = attack_from_clients(server, requests)
        after = Footprint.of(server)
        server.errors.seek(0)
        log = server.errors.read()
    record_property("times", requests)
    record_property("requests", requests)
    record_property("memory_growth_mib", round(after.memory - before.memory))
    assert not neighbour.wrong and neighbour.seconds
    assert len(seen.replies) + seen.cut == requests
    assert not [each for each in seen.replies if each[0] not in ALLOWED]
    assert "Traceback" not in log
    assert after.memory - before.memory < 150
    assert after.threads < 20 and after.files < before.files + 10
