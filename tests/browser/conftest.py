"""One browser for all tests of a process; without Chromium they are skipped, but not in CI."""

import pytest
from chromium import NAMES, REQUIRED, chromium, chromium_path, is_required


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium."""
    if chromium_path() is None:
        message = f"no Chromium on PATH ({', '.join(NAMES)}); `apt-get install chromium` brings one"
        if is_required():
            pytest.fail(f"{message}, and {REQUIRED}=required asks for it")
        pytest.skip(message)
    with chromium() as found:
        yield found
