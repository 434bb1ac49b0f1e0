"""Who we are to an object store: the usual AWS_* variables, else the profile of the usual files; never anything else.

obstore itself reads the variables (keys, session token, web identity, container and instance roles). What it does not
read are the files of the AWS command line, ~/.aws/credentials and ~/.aws/config, so a profile's keys are read here.
Nothing of this is logged, cached or put into a message.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Mapping
from pathlib import Path

from triweave.data_pipeline.errors import StorageError

_ENDPOINT = re.compile(r"https?://[A-Za-z0-9.\-_\[\]:]+/?[^\s?#@]*")
_ROLES = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
_KEYS = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key",
         "aws_session_token": "session_token"}  # fmt: skip


def store_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what an S3 store needs beside the variables that obstore reads: keys, region and endpoint.

    Raises StorageError where AWS_PROFILE names a profile that is not there or holds no keys.
    """
    named = environment.get("AWS_PROFILE")
    from_variables = "AWS_ACCESS_KEY_ID" in environment or any(name in environment for name in _ROLES)
    profile = _profile(environment, named or "default") if named or not from_variables else {}
    if named and not profile:
        raise StorageError(f"AWS_PROFILE={named}: no such profile in ~/.aws/credentials or ~/.aws/config; unset it")
    options = {}
    if not from_variables and profile:
        options = {option: profile[key] for key, option in _KEYS.items() if profile.get(key)}
        if named and "access_key_id" not in options:
            raise StorageError(
                f"AWS_PROFILE={named}: holds no access key (single sign-on or a role?); put its keys into the "
                "environment with `aws configure export-credentials --format env`"
            )
    endpoint = (
        environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL")
        or environment.get("AWS_ENDPOINT")
        or profile.get("endpoint_url")
    )
    if endpoint and not _ENDPOINT.fullmatch(endpoint):
        raise StorageError(f"the S3 endpoint {endpoint!r} (AWS_ENDPOINT_URL): must be http:// or https:// and a host")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or profile.get("region")
    return options | ({"endpoint": endpoint} if endpoint else {}) | ({"region": region} if region else {})


def _profile(environment: Mapping[str, str], name: str) -> dict[str, str]:
    """Return the settings of a profile, those of the credentials file first; empty where there is none."""
    folder = Path(environment.get("HOME") or Path.home()) / ".aws"
    result: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        parser = configparser.RawConfigParser()
        path = Path(environment.get(variable) or folder / file)
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeError):
            # The message of the parser would quote the line, which may be a secret.
            raise StorageError(f"{path}: cannot be read as an AWS {file} file; correct or remove it") from None
        if parser.has_section(section):
            result.update(parser.items(section))
    return result
