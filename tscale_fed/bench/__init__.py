"""Benches: figures that anybody can measure again with one command, `tscale bench NAME` or `python -m tscale_fed.bench NAME`.

A bench is one module of this package with `add_parser(subparsers)` and `run(arguments) -> int` (0 = goals met, 1 = not), light to import.
It prints a table for people and writes one JSON file with the figures, the machine, the versions and the command.

    machine.py            what the figures were measured on; the result file
    progress.py           progress lines; options.py: command line values that benches share
    step.py               speed of a whole step; step_rows.py, step_measure.py, step_table.py: what is compared, timed, printed
    kernel_profile.py     where a step's time goes, kernel by kernel
    compiled_baseline.py  the same model in bf16 with torch.compile; compiled_layer.py its layer, flat_rule.py its optimizer
    quality.py            what is learnt in so many tokens, beside the original; quality_settings.py: a run in words
    quality_text.py       its text; quality_learners.py, quality_run.py, quality_table.py: what is trained, one run, what is printed
    precision.py          what 8 bits change; precision_cases.py: against exact arithmetic, rounded_model.py: at the same states
    ablation.py           against a plain block; ablation_models.py, ablation_optimizers.py, ablation_run.py: what is compared
    memory.py             forecast and taken memory of every plan; memory_forecast.py: what the plan says
    local_way.py          the faster of two ways for the baseline's local attention
    learning.py           does the swarm learn? Command line, worker processes, verdict
    learning_rows.py      the ways to train that are compared: one peer, synchronous, swarm rules
    learning_table.py     best rate per row, share of the gap closed, the printed table
    kernels.py            every GPU kernel: checked, then timed beside torch's own; command line
    kernel_timing.py      device time of one call, by CUDA graphs over rotating buffers
    kernel_baselines.py   bf16 cuBLAS, torch's attention, a copy
    kernel_rows.py        one row of figures, the printed table
    spread.py             bytes and learning of flooding, owners, cells, pairs; spread_ways.py, spread_traffic.py: the two models
    parallel.py           several GPUs of one host; parallel_rows.py a process of it, parallel_table.py what is printed
    parallel_swarm.py     its row of real peers behind slow lines; slow_link.py such a line
    exchange.py           how much of its time a peer trains; exchange_rows.py: beside steps and at once; exchange_load.py: steps, packets
    codecs.py             every codec; codec_costs.py: bytes, time, contraction; codec_payloads.py: would compressing once more gain?
    contraction.py        what codecs send of noise, low rank, training; contraction_moves.py, contraction_ways.py: of what, and how
    in_process_swarm.py   peers with everything but sockets, exchanging packets with a fixed lag
    rules.py              which way to meet? Many simulated peers on one device; rules_rows.py: a row in words
    rules_call.py         one call: text, machine, forecast; rules_sizes.py: models and batches by name
    rules_run.py          one row; rules_results.py: the file to which calls add up, the table, curves
    rules_meeting.py      how peers meet; rules_codecs.py: codecs over all peers at once; rules_text.py: who reads what
    rules_peers.py        stacked state of the peers; rules_engine.py: their steps on the kernels, in CUDA graphs
"""

BENCHES = {
    "memory": "memory of the engine, forecast and taken",
    "ablation": "this block and optimizer against a plain modern block",
    "precision": "what 8 bits change in predictions and gradients",
    "quality": "loss after so many tokens, beside the original and bf16",
    "step": "speed of a training step beside bf16 torch.compile",
    "learning": "held-out loss of a swarm beside one peer and synchronous training",
    "spread": "bytes and learning of flooding, owners, cells and pairs",
    "rules": "rules of the swarm beside one peer and synchronous training",
    "parallel": "several GPUs of one host against one of them",
    "exchange": "how much of its time a peer of a large swarm trains",
    "codecs": "bytes, time and contraction of every codec",
    "contraction": "how much of a displacement each codec sends for its bytes",
    "kernels": "time of every GPU kernel beside torch's own",
}
"""Name -> one line of help; the module of the same name is imported only when it is asked for."""
