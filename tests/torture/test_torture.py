"""Every fault in its short form: what was promised holds, and its control shows that it need not have."""

from __future__ import annotations

import pytest

from tests.torture.line import everything, shown

FAULTS = everything()


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.parametrize("name", FAULTS)
def test_the_promise_is_kept(name: str) -> None:
    fault = FAULTS[name]
    line = fault.line(fault.quick, seed=1)
    print(shown(line))
    assert line["kept"], line
