"""`python -m exl_loader.commands.check_cards`: print a line of JSON for each card checked.

`doctor` runs this as a process of its own, because a card that fails ends its process, and
because only this check needs PyTorch and a context on the card.
"""

from __future__ import annotations

import json
import time
from typing import Any

from ..utils.errors import ExlLoaderError


def check(index: int) -> dict[str, Any] | None:
    """Open a card's kernels, which checks them. Nothing is compiled.

    Args:
        index: the card's number, as in `cuda:0`.

    Returns:
        `card`, and either `milliseconds` or what is wrong: `thing`, `actual`, `remedy`. None
        where the kernels are not compiled yet.
    """
    from ..backends.build.store import find_entry
    from ..backends.cuda.cards import card_name
    from ..backends.cuda.compilers import cuda_spec
    from ..backends.cuda.driver import Driver, driver_release
    from ..backends.cuda.ops import open_ops

    name = card_name(index)
    try:
        spec = cuda_spec(Driver().capability(index), driver=driver_release())
        if find_entry(spec) is None:
            return None
        begin = time.perf_counter()
        open_ops(index)
        return {"card": name, "milliseconds": round(1e3 * (time.perf_counter() - begin))}
    except ExlLoaderError as error:
        found = f"expected {error.expected}, found {error.actual}"
        actual = error.actual if error.expected is None else found
        return {"card": name, "thing": error.thing, "actual": actual, "remedy": error.remedy}


def main() -> None:
    """Check the cards that PyTorch sees."""
    import torch

    for index in range(torch.cuda.device_count()):
        found = check(index)
        if found is not None:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
