"""One browser for all tests of a process; without it they are skipped, but not in CI."""

import pytest

from tests.helpers.chromium import REQUIRED, chromium, is_required, missing


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    lacking = missing()
    if lacking and is_required():
        pytest.fail(f"{lacking}, and {REQUIRED}=required asks for it")
    if lacking:
        pytest.skip(lacking)
    with chromium() as found:
        yield found
