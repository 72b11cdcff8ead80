"""Object stores: the one place that turns a URI into what fsspec and deltalake need to open it.

Nothing is configured in wavemill: endpoint, region, path style and credentials come from where the stores' own tools
take them. For S3 that is botocore's chain (AWS_PROFILE and ~/.aws, AWS_ENDPOINT_URL, AWS_REGION, web identity, instance
roles), resolved once here for both libraries; for Google and Azure each library reads the same environment itself.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.config import conf

from ..tokenizers.spec import RunFailed, UserError

SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}  # and what opens them
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9.-]+)?")  # Azure's: CONTAINER@ACCOUNT.HOST
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

# One policy for both libraries: about half a minute of trying, then the run stops with a sentence and may be resumed.
_REQUEST_ATTEMPTS = 4  # botocore's, 0 to 1, 2 and 4 s apart,
_CALL_ATTEMPTS = 3  # in each of s3fs's, which see to torn bodies, too
_TABLE_RETRIES = {"max_retries": "10", "retry_timeout": "25s"}  # object_store's
_CONNECT_S, _READ_S = 5, 10  # without a byte

_SECRETS = (  # in URLs: what signs them, and user:password@ or user@ before the host
    re.compile(
        r"(?i)([?&](?:x-amz-|x-goog-)?(?:signature|credential|security-token|token|sig|awsaccesskeyid|key|secret)=)[^&\s\"'<>]+"
    ),
    re.compile(r"(//)[^/\s@?#]+:[^/\s@?#]+@"),
    re.compile(r"(https?://)[^/\s@?#]+@"),
)


class StoreTrouble(RunFailed):
    """The store does not answer as it should, after all retries: what was done stays, and a later run goes on."""


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Where S3 is and who we are there, as botocore finds it out."""

    region: str | None
    endpoint: str | None  # None: AWS's own
    virtual_host: bool  # bucket.host instead of host/bucket
    key: str | None = field(repr=False)
    secret: str | None = field(repr=False)
    token: str | None = field(repr=False)
    anonymous: bool


def is_remote(uri: str) -> bool:
    """Whether this names an object of a store, by its scheme: s3://, gs://, az://."""
    scheme, separator, _ = uri.partition("://")
    return bool(separator) and scheme.lower() in SCHEMES


def has_scheme(uri: str) -> bool:
    """Whether this is a URL of any kind."""
    return _URI.match(uri) is not None


def require_bucket(uri: str) -> None:
    """Raise `UserError` for the URI of a store in which no bucket stands."""
    scheme, _, rest = uri.partition("://")
    if not _BUCKET.fullmatch(rest.partition("/")[0]):
        raise UserError(f"{redacted(uri)!r} names no bucket: expected {scheme.lower()}://BUCKET/PREFIX.")


def open_store(uri: str) -> tuple[Any, str]:
    """The file system that a URI, or a local path, lies in, and its path there. Raises `UserError`.

    File systems belong to the process that opened them: open them behind a fork.
    """
    if has_scheme(uri) and not is_remote(uri):
        told = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UserError(f"{redacted(uri)} is of no kind that wavemill opens: give a path, or one of {told}.")
    if not is_remote(uri):
        return fsspec.filesystem("file"), uri
    scheme = uri.partition("://")[0].lower()
    require_bucket(uri)
    bucket, slash, key = uri.partition("://")[2].partition("/")
    options: dict[str, Any] = {}
    if scheme == "s3":
        options = {
            "use_listings_cache": False,  # another process may have written meanwhile
            "config_kwargs": {
                "retries": {"mode": "standard", "total_max_attempts": _REQUEST_ATTEMPTS},
                "connect_timeout": _CONNECT_S,
                "read_timeout": _READ_S,
            },
        }
    try:
        store, top = fsspec.core.url_to_fs(f"{scheme}://{bucket}", **options)  # which takes `::` in a key for a chain
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{redacted(uri)} cannot be opened: {error}. Install what reads it: pip install {SCHEMES[scheme]}"
        ) from error
    if scheme == "s3":
        store.retries = _CALL_ATTEMPTS
        _retry_server_errors()
    return store, f"{top}{slash}{key}"


def table_options(uri: str) -> dict[str, str]:
    """deltalake's `storage_options` for a table at a URI. Credentials of roles, which expire, are renewed."""
    if not is_remote(uri):
        return {}
    options = dict(_TABLE_RETRIES)
    if not uri.lower().startswith("s3://"):
        return options
    settings = s3_settings()
    if settings.key is None and not settings.anonymous:  # deltalake would ask this machine's metadata service
        raise UserError(
            f"{redacted(uri)}: no credentials for S3 were found. Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or give this machine a role; for a public bucket set FSSPEC_S3_ANON=1."
        )
    found = {
        "aws_region": settings.region or "us-east-1",  # what botocore takes for stores without regions, too
        "aws_endpoint_url": settings.endpoint,
        "aws_access_key_id": settings.key,
        "aws_secret_access_key": settings.secret,
        "aws_session_token": settings.token,
    }
    options |= {name: value for name, value in found.items() if value is not None}
    if settings.anonymous:
        options["aws_skip_signature"] = "true"
    if settings.virtual_host:
        options["aws_virtual_hosted_style_request"] = "true"
    if (settings.endpoint or "").startswith("http://"):
        options["aws_allow_http"] = "true"
    return options


def creation_is_known_atomic(uri: str) -> bool:
    """Whether the store is one whose makers promise that of several who create an object at once one succeeds.

    Amazon S3 (since 2024), Google and Azure do. For others, see `drivers.race_creation`.
    """
    return not uri.lower().startswith("s3://") or s3_settings().endpoint is None


def where(uri: str) -> str:
    """Which service a URI leads to, in words."""
    if not uri.lower().startswith("s3://"):
        return f"as {SCHEMES[uri.partition('://')[0].lower()]} finds it"
    settings = s3_settings()
    who = "anonymous" if settings.anonymous else "signed" if settings.key else "without credentials"
    return f"{redacted(settings.endpoint or 'AWS')}, region {settings.region or 'not set'}, {who}"


def s3_settings() -> S3Settings:
    """What botocore, and fsspec's own configuration (FSSPEC_S3_KEY, FSSPEC_S3_ANON ...), say of S3.

    Raises `StoreTrouble` for a profile that does not exist or credentials that cannot be had.
    """
    from botocore.exceptions import BotoCoreError

    chosen = {**conf.get("s3", {})}
    kwargs = chosen.get("client_kwargs", {})
    try:
        client = _s3_client(chosen.get("profile"), chosen.get("endpoint_url") or kwargs.get("endpoint_url"))
        anonymous = _is_true(chosen.get("anon", False))
        credentials = None
        if not anonymous and not chosen.get("key"):
            found = _session(chosen.get("profile")).get_credentials()
            credentials = found.get_frozen_credentials() if found is not None else None
    except BotoCoreError as error:
        told = redacted(str(error)).strip(" .")
        raise StoreTrouble(f"S3's settings cannot be read: {told}. See AWS_PROFILE and ~/.aws/config.") from error
    endpoint = client.meta.endpoint_url
    own = urlsplit(endpoint).hostname or ""
    is_aws = own.endswith((".amazonaws.com", ".amazonaws.com.cn"))
    style = ((client.meta.config.s3 or {}).get("addressing_style")) or ("auto" if is_aws else "path")
    return S3Settings(
        region=kwargs.get("region_name") or client.meta.region_name,
        endpoint=None if is_aws else endpoint,
        virtual_host=style == "virtual",
        key=chosen.get("key") or (credentials.access_key if credentials else None),
        secret=chosen.get("secret") or (credentials.secret_key if credentials else None),
        token=chosen.get("token") or (credentials.token if credentials else None),
        anonymous=anonymous,
    )


@contextmanager
def store_errors(uri: str, *, creating: bool = False) -> Iterator[None]:
    """What a store refuses or cannot do, as `StoreTrouble` in one sentence.

    That an object is missing or there already is raised as `FileNotFoundError` and `FileExistsError`, in every store;
    for a local path nothing is changed.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, EOFError):
        raise
    except Exception as error:
        if not is_remote(uri) or isinstance(error, (UserError, RunFailed)):
            raise
        # botocore's answers to conditions are of no kind of their own; 409: another creates the object just now
        if _status(error) == 412 or (creating and _status(error) == 409):
            raise FileExistsError(uri) from error
        told = redacted(" ".join(str(error).split()).strip(" .") or type(error).__name__)[:300]
        raise StoreTrouble(f"{uri}: the store failed: {told}. {_advice(error)}") from error


def _advice(error: Exception) -> str:
    kept = "What was committed stays; run the same command again."
    told = f"{type(error).__name__} {error}"
    if isinstance(error, PermissionError) or "Credentials" in told or "Token" in told:
        return f"See that credentials are there, have not expired and may do this (AWS_PROFILE, roles). {kept}"
    if "Endpoint" in told or "Connect" in told:
        return f"See that the endpoint is right and can be reached (AWS_ENDPOINT_URL, AWS_REGION). {kept}"
    return kept


def redacted(text: str) -> str:
    """A message without signatures, tokens and passwords that URLs in it may hold."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return text


@cache
def _session(profile: str | None) -> Any:
    import botocore.session

    return botocore.session.Session(profile=profile)


@cache
def _s3_client(profile: str | None, endpoint: str | None) -> Any:
    return _session(profile).create_client("s3", endpoint_url=endpoint)


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("1", "true", "yes")


@cache
def _retry_server_errors() -> None:
    """Have s3fs try every 5xx again: by itself it does so only for some."""
    import s3fs.core

    s3fs.core.set_custom_error_handler(_is_server_error)


def _is_server_error(error: Exception) -> bool:
    return _status(error) >= 500


def _status(error: BaseException | None) -> int:
    """The HTTP status of the answer behind an error, or 0."""
    while error is not None:
        response = getattr(error, "response", None) or {}
        if isinstance(response, dict) and "ResponseMetadata" in response:
            return response["ResponseMetadata"].get("HTTPStatusCode", 0)
        error = error.__cause__
    return 0
