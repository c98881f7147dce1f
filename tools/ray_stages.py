"""Serve layers on the nodes of a Ray cluster: `ray_stages.py MODELS --machines ADDRESS ...`.

    python tools/ray_stages.py MODELS --machines tcp://192.168.1.10:29500 --world-size 3 --gpus 2

One actor on each of two nodes then runs `python -m exl_loader serve-stage`, as rank 1 and 2. The
model is loaded by any front end at the address, which need not be a node. Ray only starts the
programs, gives them cards and ends them; layers and hidden states are serve-stage's. It needs
`pip install ray` here and exl_loader on each node, in the Python that Ray runs there. Ctrl-C ends
all of them.
"""

from __future__ import annotations

import argparse

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Stage:
    """A machine of the ring."""

    def serve(self, arguments: list[str]) -> int:
        """Run serve-stage; returns when it ends, with its exit code."""
        from exl_loader.commands import cli

        return cli.main(["serve-stage", *arguments])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", metavar="MODELS", help="as of serve-stage, on every node")
    parser.add_argument("--machines", metavar="ADDRESS", required=True, help="as of serve-stage")
    parser.add_argument("--world-size", type=int, required=True, metavar="N",
                        help="how many machines there are, the first one included")
    parser.add_argument("--gpus", type=float, default=0, help="cards of each node (default 0)")
    parser.add_argument("--cpus", type=float, default=1, help="cores of each node (default 1)")
    parser.add_argument("--device", default="auto", help="as of serve-stage")
    parser.add_argument("--same-node", action="store_true",
                        help="several machines may be on one node, to try it out")
    args = parser.parse_args()
    ray.init()
    bundles = [{"CPU": args.cpus, "GPU": args.gpus} for _ in range(args.world_size - 1)]
    group = placement_group(bundles, "PACK" if args.same_node else "STRICT_SPREAD")
    print("waiting for the nodes", flush=True)
    ray.get(group.ready())
    running = []
    for index in range(args.world_size - 1):
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        stage = Stage.options(
            num_cpus=args.cpus, num_gpus=args.gpus, scheduling_strategy=where
        ).remote()
        running.append(stage.serve.remote([
            args.models, "--device", args.device, "--machines", args.machines,
            "--rank", str(index + 1), "--world-size", str(args.world_size),
        ]))
    print(f"{len(running)} machines serve layers; Ctrl-C ends them", flush=True)
    ray.get(running)


if __name__ == "__main__":
    main()
