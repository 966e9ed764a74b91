"""Where the AWS libraries would find credentials, looked up without using them."""

from __future__ import annotations

import botocore.exceptions
import botocore.session

from fusecache.errors import ConfigError


class MissingProfileError(ConfigError):
    """The AWS configuration has no profile of this name."""


def find_aws_credentials(profile: str | None) -> str | None:
    """The method by which credentials are found, like `env` or `iam-role`; None when there are none.

    May ask the metadata service of the machine, once, for at most 1 s. Raises MissingProfileError, and ConfigError for
    a configuration that can't be read.
    """
    try:
        session = botocore.session.Session(profile=profile)
        session.set_config_variable("metadata_service_timeout", 1)
        session.set_config_variable("metadata_service_num_attempts", 1)
        found = session.get_credentials()
    except botocore.exceptions.ProfileNotFound:
        raise MissingProfileError(f"there is no AWS profile {profile!r}") from None
    except botocore.exceptions.BotoCoreError as error:
        raise ConfigError(f"the AWS configuration is broken ({type(error).__name__})") from None
    return None if found is None else str(found.method)
