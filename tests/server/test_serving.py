"""The files of HTTPS, checked before a server starts."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from inlaid.config import ConfigError, ServerConfig
from inlaid.server.serving import tls


def test_without_files_connections_are_plain() -> None:
    assert tls(ServerConfig()) is None


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_certificate_and_its_key_encrypt(tmp_path: Path) -> None:
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*make, "-subj", "/CN=x", "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = tls(ServerConfig(ssl_certfile=certificate, ssl_keyfile=key))
    assert isinstance(context, ssl.SSLContext)
    with pytest.raises(ConfigError, match="must be PEM files"):
        tls(ServerConfig(ssl_certfile=key, ssl_keyfile=certificate))


def test_files_that_do_not_do_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--ssl-keyfile needs --ssl-certfile"):
        tls(ServerConfig(ssl_keyfile="key.pem"))
    with pytest.raises(ConfigError, match=r"--ssl-certfile /nowhere\.pem and its key cannot be used"):
        tls(ServerConfig(ssl_certfile="/nowhere.pem"))
