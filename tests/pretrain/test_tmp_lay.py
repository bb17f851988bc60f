from tests.pretrain.test_engine import *


def test_flow(tmp_path):
    jobs = [
        {"name": "flow-zero-3", "stage": 3, "order": "interleaved", "micro": 2, "paradigm": "flow"},
        {"name": "flow-one-row", "stage": 2, "batch": 1, "paradigm": "flow"},
        {"name": "flow-pipeline", "pipeline": 2, "paradigm": "flow"},
        {"name": "l1-pipeline", "pipeline": 2, "paradigm": "l1"},
    ]
    results = run(tmp_path, 2, [{"steps": 4, **job} for job in jobs])
    compare(jobs, results)
    print(results)
