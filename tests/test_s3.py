"""What S3 and its library can answer with, in words, and whether asking again may help."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from botocore import exceptions

from eqm import s3
from eqm.errors import AwayError, StoreError


def refusal(code: str, status: int) -> exceptions.ClientError:
    told: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return exceptions.ClientError(told, "PutObject")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (refusal("SlowDown", 503), AwayError, "look at the server"),
        (refusal("TooManyRequests", 429), AwayError, "look at the server"),
        (refusal("RequestTimeout", 400), AwayError, "look at the server"),
        (refusal("RequestTimeTooSkewed", 403), AwayError, "set the clock"),
        (refusal("ExpiredToken", 400), StoreError, "have expired .*renew them"),
        (refusal("AccessDenied", 403), StoreError, "check AWS_ACCESS_KEY_ID"),
        (refusal("QuotaExceeded", 403), StoreError, "QuotaExceeded"),
        (
            exceptions.MetadataRetrievalError(error_msg="no route"),
            AwayError,
            "cannot be had",
        ),
        (exceptions.UnauthorizedSSOTokenError(), StoreError, "SSO session .*check the AWS_"),
    ],
)
def test_every_answer_is_told_and_what_passes_is_told_from_what_stays(
    error: Exception, kind: type[StoreError], words: str
) -> None:
    with pytest.raises(StoreError, match=words) as told, s3._in_words("http://s3", "b", "s3://b/k"):
        raise error
    assert type(told.value) is kind


def test_credentials_that_cannot_be_had_for_a_while_are_no_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are renewed within minutes of their end by what gave them out, which may be away."""
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=2)
    given = {
        "Version": 1,
        "AccessKeyId": "a",
        "SecretAccessKey": "b",
        "Expiration": f"{soon:%FT%TZ}",
    }
    (tmp_path / "given").write_text(json.dumps(given))
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path}/given\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "here")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    bucket = s3.Bucket("b")
    (tmp_path / "given").unlink()
    with pytest.raises(
        AwayError, match=r"credentials for S3 at http://127\.0\.0\.1:9 cannot be had"
    ):
        bucket.read("k")
