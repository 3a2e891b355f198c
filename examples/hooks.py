"""The experiments' own loop, told and stopped from outside: a hook for wandb, Optuna, MLflow and the like.

    pip install '.[experiments]'
    python examples/hooks.py

The hook gets a dictionary after every epoch. What it returns or raises decides:

    wandb     run = wandb.init();                        hook = run.log
    Optuna    def hook(told):                            (an exception ends the run, once the epoch is saved)
                  trial.report(told["eval_top1"], told["epoch"])
                  if trial.should_prune():
                      raise optuna.TrialPruned
    patience  as below: True ends the run
"""

import argparse
import dataclasses
import pathlib
import tempfile

try:
    from clicktrain_experiments import configs  # installed
    from clicktrain_experiments.train.loop import train
except ModuleNotFoundError:
    from experiments import configs  # in a checkout
    from experiments.train.loop import train

PATIENCE = 5


def patient():
    """A hook that prints, and ends a pruned run whose loss has not become smaller for some epochs."""
    best, since = float("inf"), 0

    def hook(told):
        nonlocal best, since
        layers = ", ".join(f"{name} {share:.0%}" for name, share in told["layers"].items())
        print(
            f"epoch {told['epoch']}, {told['phases'][-1]}: loss {told['train_loss']:.3f}, rate "
            f"{told['learning_rate']:.3f}, zeros: {layers}"
        )
        if told["phases"][-1] != "pruned":
            return False
        best, since = (told["train_loss"], 0) if told["train_loss"] < best else (best, since + 1)
        return since == PATIENCE

    return hook


def main():
    """Train the digits' recipe, shortened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    epochs = parser.parse_args().epochs
    recipe = configs.get("digits-clicktrain")
    method = dataclasses.replace(recipe.method, select_epoch=epochs // 4, prune_epoch=epochs // 2)
    loop = dataclasses.replace(recipe.loop, progress=False)
    config = dataclasses.replace(recipe, epochs=epochs, method=method, loop=loop)
    with tempfile.TemporaryDirectory() as folder:
        summary = train(config, pathlib.Path(folder) / "run", on_epoch=patient())
    print(f"top-1 {100 * summary['final_top1']:.1f}%, {summary['conv_compression']:.1f}x fewer convolution weights")


if __name__ == "__main__":
    main()
