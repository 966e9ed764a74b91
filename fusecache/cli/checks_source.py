"""The checks of `fusecache doctor` that concern a source: credentials, reachability, clock."""

from __future__ import annotations

import email.utils
import http.client
import os
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from fusecache.cli.checks import Check
from fusecache.config.model import SourceConfig, Tuning
from fusecache.errors import (
    AccessDeniedError,
    ConfigError,
    FusecacheError,
    NotFoundError,
    TemporaryOriginError,
    UnavailableError,
)

_S3_SCHEMES = ("s3", "s3a")
_GCS_SCHEMES = ("gs", "gcs")
_LISTING_DEADLINE = 15.0
_SKEW_WARN = 60.0
_SKEW_FAIL = 300.0
"""Seconds: S3 refuses signatures that are 15 minutes off, short-lived tokens stop working before."""


def run_source_checks(
    source: SourceConfig, tuning: Tuning, env: Mapping[str, str] = os.environ
) -> list[Check]:
    """Check one source; blocks for some seconds at most. Raises nothing."""
    name = f" {source.name}" if source.name else ""
    checks = [check_credentials(f"credentials{name}", source, env)]
    checks.append(check_reachable(f"source{name}", source, tuning))
    endpoint = find_endpoint(source, env)
    if endpoint:
        checks.append(check_clock(f"clock{name}", endpoint))
    return checks


def find_endpoint(source: SourceConfig, env: Mapping[str, str]) -> str | None:
    """The HTTP address whose clock counts, if the source has one."""
    scheme = urlsplit(source.url).scheme.split(":")[0].split("+")[0]
    if source.endpoint_url:
        return source.endpoint_url
    if scheme in _S3_SCHEMES:
        region = source.region or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"
        return (
            env.get("AWS_ENDPOINT_URL_S3")
            or env.get("AWS_ENDPOINT_URL")
            or f"https://s3.{region}.amazonaws.com"
        )
    if scheme in _GCS_SCHEMES:
        emulator = env.get("STORAGE_EMULATOR_HOST")
        if emulator:
            return emulator if "://" in emulator else f"http://{emulator}"
        return "https://storage.googleapis.com"
    return source.url if scheme in ("http", "https") else None


def check_credentials(name: str, source: SourceConfig, env: Mapping[str, str]) -> Check:
    """Where the libraries would take credentials from; the detail never holds the credentials."""
    scheme = urlsplit(source.url).scheme
    if source.anonymous:
        return Check(name, "ok", "anonymous")
    if source.access_key_id is not None:
        return Check(name, "ok", "access key from the fusecache settings")
    if source.credentials_file is not None:
        if os.access(source.credentials_file, os.R_OK):
            return Check(name, "ok", f"from {source.credentials_file}")
        return Check(name, "fail", f"{source.credentials_file} can't be read", "correct credentials_file")
    if scheme in _S3_SCHEMES:
        return _check_aws_credentials(name, source)
    if scheme in _GCS_SCHEMES:
        return _check_google_credentials(name, env)
    return Check(name, "ok", f"none needed for {scheme}, or as its library finds them")


def _check_aws_credentials(name: str, source: SourceConfig) -> Check:
    from fusecache.origin.credential_lookup import MissingProfileError, find_aws_credentials

    mend = (
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, run aws configure, give the machine an instance "
        "role, or set anonymous for a public bucket"
    )
    try:
        method = find_aws_credentials(source.profile)
    except MissingProfileError as error:
        return Check(name, "fail", str(error), "correct profile")
    except ConfigError as error:
        return Check(name, "fail", str(error), mend)
    if method is None:
        return Check(name, "fail", "no AWS credentials found", mend)
    return Check(name, "ok", f"AWS, from {method}")


def _check_google_credentials(name: str, env: Mapping[str, str]) -> Check:
    import google.auth
    import google.auth.exceptions

    if env.get("STORAGE_EMULATOR_HOST"):
        return Check(name, "ok", "none needed for an emulator")
    try:
        google.auth.default()
    except google.auth.exceptions.GoogleAuthError:
        mend = (
            "set GOOGLE_APPLICATION_CREDENTIALS, run gcloud auth application-default login, use a service "
            "account of the machine, or set anonymous for a public bucket"
        )
        return Check(name, "fail", "no Google credentials found", mend)
    return Check(name, "ok", "Google application default credentials")


def check_reachable(name: str, source: SourceConfig, tuning: Tuning) -> Check:
    """Whether the source can be listed: asks for its first object, as a mount would."""
    from fusecache.origin.factory import open_origin

    patient = tuning.model_copy(update={"deadline": min(tuning.deadline, _LISTING_DEADLINE)})
    started = time.monotonic()
    try:
        origin = open_origin(source, patient)
        try:
            first = next(iter(origin.list_objects()), None)
            seen = f"{origin.identity} ({origin.engine}) answered in {time.monotonic() - started:.2f} s"
        finally:
            origin.close()
    except NotFoundError as error:
        return Check(name, "fail", str(error), "correct the bucket or the endpoint_url")
    except AccessDeniedError as error:
        return Check(name, "fail", str(error), "correct the credentials, or permit them to list and read")
    except (UnavailableError, TemporaryOriginError) as error:
        return Check(name, "fail", str(error), "check the network, proxy and endpoint_url")
    except FusecacheError as error:
        return Check(name, "fail", str(error), "correct the source")
    if first is None:
        return Check(name, "warn", f"{seen}, and holds no object", "correct the prefix, or upload a model")
    return Check(name, "ok", seen)


def check_clock(name: str, endpoint: str) -> Check:
    """Whether this machine's clock agrees with the Date that the server sends with any answer, an error too."""
    parts = urlsplit(endpoint)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        connection = kind(parts.hostname or "", parts.port, timeout=5)
        try:
            connection.request("HEAD", "/")
            date = connection.getresponse().getheader("Date")
        finally:
            connection.close()
        now = time.time()
        theirs = email.utils.parsedate_to_datetime(date).timestamp() if date else None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        return Check(
            name, "warn", f"not compared: {parts.netloc}: {reason}", "check the network and endpoint_url"
        )
    if theirs is None:
        return Check(name, "warn", f"{parts.netloc} sends no Date", "compare the clock with date -u")
    skew = now - theirs
    detail = f"{abs(skew):.0f} s {'ahead of' if skew >= 0 else 'behind'} {parts.netloc}"
    mend = "synchronize the clock: timedatectl set-ntp true"
    if abs(skew) > _SKEW_FAIL:
        return Check(name, "fail", f"{detail}: signatures are refused", mend)
    if abs(skew) > _SKEW_WARN:
        return Check(name, "warn", detail, mend)
    return Check(name, "ok", "within " + (f"{abs(skew) + 1:.0f} s of {parts.netloc}"))
