"""Keys, folders and tenants, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlaid.config import ConfigError, ServerConfig
from inlaid.server import safety
from inlaid.server.errors import BadRequest, Forbidden, Unauthorized
from inlaid.server.safety import AllowedFolders, Keys


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_keys_everybody_may_ask_and_nobody_may_administer() -> None:
    keys = Keys((), None)
    keys.check_inference({})
    with pytest.raises(Forbidden, match="--admin-key"):
        keys.check_admin(bearer("anything"))


def test_the_inference_key_does_not_administer() -> None:
    keys = Keys(("one", "two"), "admin")
    for key in ("one", "two", "admin"):
        keys.check_inference(bearer(key))
    for headers in ({}, bearer("three"), bearer(""), {"Authorization": "Basic one"}, {"Authorization": "one"}):
        with pytest.raises(Unauthorized):
            keys.check_inference(headers)
    keys.check_admin(bearer("admin"))
    for headers in ({}, bearer("one"), bearer("admi"), bearer("admin2")):
        with pytest.raises(Unauthorized):
            keys.check_admin(headers)


def test_paths_are_for_the_admin_key_or_where_there_are_no_keys() -> None:
    assert Keys((), None).opens_paths({})
    for keys in (Keys(("one",), None), Keys(("one",), "admin"), Keys((), "admin")):
        assert not any(keys.opens_paths(headers) for headers in ({}, bearer(""), bearer("one")))
        assert keys.opens_paths(bearer("admin")) == keys.has_admin


def test_keys_come_from_the_environment_too() -> None:
    keys = Keys.of(ServerConfig(), {"INLAID_API_KEY": "a, b", "INLAID_ADMIN_KEY": "c"})
    keys.check_inference(bearer("b"))
    keys.check_admin(bearer("c"))
    with pytest.raises(Unauthorized):
        keys.check_inference({})


def test_settings_that_would_leave_a_door_open_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="also an inference key"):
        Keys(("same",), "same")
    with pytest.raises(ConfigError, match="empty"):
        Keys(("",), None)
    on = ServerConfig(allow_runtime_lora=True, lora_root=(str(tmp_path),))
    with pytest.raises(ConfigError, match="--admin-key"):
        safety.check_config(on, Keys((), None))
    with pytest.raises(ConfigError, match="--lora-root"):
        safety.check_config(ServerConfig(allow_runtime_lora=True), Keys((), "admin"))
    with pytest.raises(ConfigError, match="nowhere"):
        AllowedFolders([str(tmp_path / "nowhere")])


def test_a_named_key_is_a_tenant(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsales=abc\n\nc2VjcmV0==\n")
    keys = Keys.of(ServerConfig(api_key=("support=x=y", "support=old"), api_key_file=str(file)), {})
    for key, tenant in (("abc", "sales"), ("x=y", "support"), ("old", "support")):
        keys.check_inference(bearer(key))
        assert safety.tenant("api-key", keys, bearer(key), None, None) == tenant
    keys.check_inference(bearer("c2VjcmV0=="))  # as base64 ends, and no name
    assert len(keys.tenants) == 3
    with pytest.raises(Unauthorized):
        keys.check_inference(bearer("sales=abc"))


def test_keys_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the key of 'b' is also that of 'a'"):
        Keys(("a=same", "b=same"), None)
    with pytest.raises(ConfigError, match="also an inference key"):
        Keys(("a=same",), "same")
    (tmp_path / "empty").write_text("# none\n")
    for name, message in (("empty", "holds no key"), ("gone", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            Keys.of(ServerConfig(api_key_file=str(tmp_path / name)), {})


def test_a_tenant_that_no_request_can_have_is_refused_by_name() -> None:
    keys = Keys(("sales=abc", "support=x"), None)
    safety.check_tenants("api-key", keys, (), ["sales"], "weights")
    with pytest.raises(BadRequest, match="weights names 'sale', no tenant here; known: sales, support"):
        safety.check_tenants("api-key", keys, (), ["sale"], "weights")
    with pytest.raises(BadRequest, match="limits names 'nobody'"):
        safety.check_tenants("adapter", keys, ("maths",), ["maths", "", "nobody"], "limits")
    safety.check_tenants("user", keys, (), ["anybody"], "weights")
    safety.check_tenants("api-key", Keys((), None), (), ["key-0a0b"], "weights")


def test_what_is_rarely_meant_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def warnings(host: str, policy: str, kind: str, *given: str) -> str:
        caplog.clear()
        safety.warn_of_risks(ServerConfig(host=host), policy, kind, Keys(given, None))
        return caplog.text

    assert warnings("127.0.0.1", "fcfs", "api-key") == warnings("::1", "vtc", "header") == ""
    assert "every client that reaches 0.0.0.0" in warnings("0.0.0.0", "fcfs", "api-key")
    assert warnings("0.0.0.0", "vtc:predict=1", "api-key", "a=1", "b=2") == ""
    assert "policy vtc:predict=1 shares" in warnings("localhost", "vtc:predict=1", "api-key", "a=1")


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """Make a root with an adapter, an outsider beside it, and ways out of it."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "good", outside):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    (root / "link").symlink_to(outside)
    (root / "leaky").mkdir()
    (root / "leaky" / "adapter_model.safetensors").symlink_to(outside / "adapter_config.json")
    (root / "inner").symlink_to(root / "good")
    return tmp_path


def test_folders_inside_are_found_by_any_of_their_names(roots: Path) -> None:
    allowed = AllowedFolders([str(roots / "root")])
    good = (roots / "root" / "good").resolve()
    for path in (str(good), "good", "./good", "inner"):
        assert allowed.resolve(path) == good


@pytest.mark.parametrize(
    "path",
    "../outside good/../../outside link leaky /etc / good\0 nowhere ~ good/.. good/adapter_config.json".split(" "),
)
def test_ways_out_are_all_answered_alike(roots: Path, path: str) -> None:
    allowed = AllowedFolders([str(roots / "root")])
    with pytest.raises(Forbidden, match="must be a folder inside"):
        allowed.resolve(path)
    with pytest.raises(Forbidden):
        AllowedFolders([]).resolve("good")


def test_a_sibling_with_the_roots_name_as_prefix_is_outside(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "rooted").mkdir()
    with pytest.raises(Forbidden):
        AllowedFolders([str(tmp_path / "root")]).resolve(str(tmp_path / "rooted"))


def test_tenants() -> None:
    headers, keys = {**bearer("secret"), safety.TENANT_HEADER: "team"}, Keys((), None)
    assert safety.tenant("adapter", keys, headers, "me", "maths") == "maths"
    assert safety.tenant("user", keys, headers, "me", None) == "me"
    assert safety.tenant("header", keys, headers, None, None) == "team"
    with pytest.raises(BadRequest, match="X-Tenant is not valid UTF-8"):
        safety.tenant("header", keys, {safety.TENANT_HEADER: chr(0xDCFF)}, None, None)
    by_key = safety.tenant("api-key", keys, headers, None, None)
    assert by_key.startswith("key-")
    assert "secret" not in by_key
    assert safety.tenant("api-key", keys, {}, None, None) == ""
