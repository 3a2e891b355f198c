"""How long a run takes here, told from records: those alone whose cores did nothing else."""

from experiments import configs, records
from experiments.configs.base import to_dict
from experiments.report.overview import measured
from experiments.report.pace import Pace

CONFIG = configs.get("compare-slim-dense")


def record(seconds, **setting):
    where = records.setting()
    return {
        "name": CONFIG.name,
        "epochs": CONFIG.total_epochs,
        "net": CONFIG.net,
        "config": to_dict(CONFIG),
        "setting": where | setting,
        "encoding": "png",
        "final_top1": 0.8,
        "train_and_compile_seconds": seconds,
        "eval_seconds": 0.0,
    }


def test_seconds_on_shared_cores_say_nothing():
    alone, shared, one_of_two = record(100.0), record(900.0, shared_cores=True), record(900.0, runs_at_once=2)
    pace = Pace.of([alone, shared, one_of_two], records.setting())
    assert pace.has(CONFIG) and pace.seconds(CONFIG) == 100
    assert not Pace.of([shared], records.setting()).has(CONFIG)
    assert "100 s on" in measured(CONFIG, [alone, shared])
    assert measured(CONFIG, [shared]) == "measured 80.00 (n=1, png images)"
