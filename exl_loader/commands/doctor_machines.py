"""`doctor --machines ADDRESS`: reach every machine, measure every link, expect decode speed."""

from __future__ import annotations

from typing import Any

from ..machines.address import parse_address
from ..utils.progress import default_progress

# Hidden sizes for which the expected speed is said: 8B, 32B and 70B models of Llama's family.
HIDDEN_SIZES = (4096, 5120, 8192)
# The speed of a model on one machine, for the example of what the network takes.
EXAMPLE_TOKENS_PER_S = 20.0


def examine_machines(text: str) -> dict[str, Any]:
    """Connect to all machines and measure.

    Args:
        text: the first machine's address; this process is the first machine.

    Raises:
        InvalidSettings: it is no address.
        MachineRefused: a machine is missing or does not fit.
        MachineLost: a machine was lost meanwhile.
    """
    address = parse_address(text, "--machines")
    from ..machines.connection import connect
    from ..machines.probe import describe_machines, measure, token_seconds

    machines = connect(address, default_progress())
    try:
        found = describe_machines(machines)
        links = measure(machines)
    finally:
        machines.close()
    problems = []
    versions = sorted({machine["torch"] for machine in found})
    if len(versions) > 1:
        problems.append({
            "problem": f"the machines have different versions of PyTorch: {', '.join(versions)}",
            "remedy": "Install the same version on all machines, so that they compute the same",
        })
    return {
        "address": str(address),
        "machines": found,
        "links": [
            {
                "from": link.sender.rank, "to": link.receiver.rank,
                "latency_s": link.latency_s, "bytes_per_s": link.bytes_per_s,
            }
            for link in links
        ],
        "token_seconds": {
            str(hidden_size): token_seconds(links, hidden_size) for hidden_size in HIDDEN_SIZES
        },
        "problems": problems,
    }


def describe_machines_report(report: dict[str, Any]) -> str:
    """Write a report as text for a person."""
    lines = [f"{len(report['machines'])} machines at {report['address']}"]
    for machine in report["machines"]:
        lines.append(
            f"  {machine['rank']}  {machine['host']}: exl_loader {machine['exl_loader']}, PyTorch "
            f"{machine['torch']}, Python {machine['python']}, {machine['system']}, "
            f"{machine['processor']}"
        )
    lines += ["", "links"]
    for link in report["links"]:
        lines.append(
            f"  {link['from']} -> {link['to']}  latency {1e6 * link['latency_s']:.0f} µs, "
            f"bandwidth {link['bytes_per_s'] / 1e6:.0f} MB/s "
            f"({8 * link['bytes_per_s'] / 1e9:.2f} Gbit/s)"
        )
    lines += ["", "what the network adds to each token of one request"]
    for hidden_size, seconds in report["token_seconds"].items():
        lines.append(
            f"  hidden size {hidden_size}: {1e3 * seconds:.2f} ms, so at most "
            f"{1 / seconds:.0f} tokens/s; {EXAMPLE_TOKENS_PER_S:.0f} tokens/s on one machine "
            f"become {expected_speed(EXAMPLE_TOKENS_PER_S, seconds):.1f}"
        )
    for problem in report["problems"]:
        lines += ["", f"problem: {problem['problem']}", f"      -> {problem['remedy']}"]
    return "\n".join(lines)


def expected_speed(tokens_per_s: float, seconds: float) -> float:
    """Return the speed of one request, from that without a network and what it adds a token."""
    return 1 / (1 / tokens_per_s + seconds)
