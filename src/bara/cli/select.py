"""`bara select`: which texts of an unlabelled pool to label next."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Option

from bara.cli.options import Adapter, BaseModel, BatchSize, NumDraws, Seed, Split


def select(
    adapter: Adapter,
    data: Annotated[str, Option(help="Table of unlabelled texts, the pool.")],
    k: Annotated[int, Option("--k", "-k", min=1, help="How many texts to choose.")] = 100,
    by: Annotated[
        str,
        Option(
            help="bald: mutual information; entropy; diversity: spread over the adapter's "
            "features; batch: mutual information and spread."
        ),
    ] = "batch",
    output: Annotated[
        str, Option(help="JSONL or CSV file; - writes JSONL to standard output.")
    ] = "-",
    split: Split = None,
    num_draws: NumDraws = 10,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    base_model: BaseModel = None,
) -> None:
    """Choose the texts of a pool whose labels would teach the model most.

    The chosen rows are written with their number in the pool and their scores in nats, the first
    to label first.
    """
    from bara.cli.terminal import extended_rows, say_train
    from bara.data.tables import check_output_table, write_table
    from bara.evaluation.acquisition import FEATURES, check_count, check_strategy
    from bara.evaluation.acquisition import select as choose
    from bara.finetuning.load import load_adapter, read_task
    from bara.finetuning.task_inputs import predict_table, read_table
    from bara.machine import quieten_libraries
    from bara.ranks.features import adapter_features

    quieten_libraries()
    check_output_table(output)
    strategy = check_strategy(by)
    table = read_table(data, read_task(adapter), split=split)
    check_count(k, len(table))
    model, tokenizer, task = load_adapter(adapter, base_model=base_model)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": None}
    predictive = predict_table(
        model,
        tokenizer,
        task,
        table,
        labels=False,
        command="select",
        num_draws=num_draws,
        seed=seed,
        **options,
    )
    features = None
    if strategy in FEATURES:
        inputs = task.inputs(table, tokenizer, labels=False)
        features = adapter_features(model, inputs, **options)
    chosen = choose(predictive, k, by=strategy, features=features, seed=seed)
    index = chosen.index.tolist()
    scores = {"bald": chosen.bald[index].tolist(), "entropy": chosen.entropy[index].tolist()}
    write_table(output, extended_rows(table, index, scores, data))
    if output != "-":
        print(f"{output} has {k} of the {len(table)} rows, the first to label first.")
        print("Label them, and train on them with the texts that had labels already.")
        say_train(adapter)
