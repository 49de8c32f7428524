"""Reports the time of a TRADES iteration with each runner: measured on this machine's GPU, else PREDICTED by a model.

python -m benchmarks.predict --gpu h100 --model wrn-34-10
"""

from __future__ import annotations

import click
from rich.console import Console

from benchmarks import gpu_prediction
from benchmarks.gpu_model import GPUS


@click.command(help=__doc__)
@click.option("--gpu", type=click.Choice(list(GPUS)), help="Whose data sheet to predict from. [h100]")
@click.option("--model", metavar="NAME", default="wrn-34-10", show_default=True, help="small-cnn, wrn-D-K, ...")
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
def main(gpu: str | None, model: str, batch_size: int) -> None:
    """Prints the table."""
    where = gpu_prediction.measurable_device()
    if where is not None and gpu is not None:
        raise click.UsageError(f"--gpu {gpu}: there is a GPU here, which is measured instead; leave --gpu away")
    try:
        if where is None:
            result = gpu_prediction.predict(GPUS[gpu or "h100"], model, batch_size)
        else:
            result = gpu_prediction.measure(where, model, batch_size)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error
    Console(soft_wrap=True).print(gpu_prediction.table(result))


if __name__ == "__main__":
    main()
