"""`stitch-ray exar`: label answers, make DATASET+ of them, and the stages that follow."""

if not __package__:
    raise SystemExit("run: python -m jobs.exar")

from pathlib import Path
from typing import Annotated

import typer

from stitch_ray.console import Overwrite, exits, job_command
from stitch_ray.errors import UserError
from stitch_ray.evaluation.answers import RougeConvention

exar = typer.Typer(
    name="exar",
    help="Metacognition: label answers, train a validator, answer anew with the wrong answers excluded.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@exar.command()
@exits
def label(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="answers with gold answers: .xlsx, .jsonl, .parquet, or run folders of sample-answers",
            metavar="INPUT...",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="run folder")],
    encoder: Annotated[
        str | None, typer.Option("--encoder", metavar="DIR", help="compute BERTScore with this encoder")
    ] = None,
    without_bert: Annotated[bool, typer.Option("--without-bert", help="the rule without BERTScore")] = False,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="ROLE=NAME", help="which column is the question, gold, prediction, ..."),
    ] = None,
    sheet: Annotated[str | None, typer.Option("--sheet", metavar="NAME", help="only this sheet of a workbook")] = None,
    convention: Annotated[
        RougeConvention, typer.Option(help="ROUGE-L of the rule: as published, or the usual one")
    ] = "rouge_101",
    rouge_f: Annotated[
        float, typer.Option(min=0, max=1, help="ROUGE-L F above this, with BERTScore, is CORRECT")
    ] = 0.5,
    bert_with_rouge: Annotated[float, typer.Option(min=0, max=1, help="least BERTScore F beside it")] = 0.5,
    rouge_p_or_r: Annotated[
        float, typer.Option(min=0, max=1, help="ROUGE-L precision or recall above this is CORRECT")
    ] = 0.6,
    bert: Annotated[float, typer.Option(min=0, max=1, help="BERTScore F above this is CORRECT")] = 0.9,
    overwrite: Overwrite = False,
) -> None:
    """Label answers CORRECT or WRONG by their agreement with the gold answers; print how that agrees with the labels
    and human judgements that the files hold."""
    from stitch_ray.exclusion.labelling import label_files
    from stitch_ray.exclusion.labels import Rule

    if encoder and without_bert:
        raise UserError("give --encoder or --without-bert, not both")
    columns = dict(_role(text) for text in column or [])
    rule = Rule(
        convention=convention, rouge_f=rouge_f, bert_with_rouge=bert_with_rouge, rouge_p_or_r=rouge_p_or_r, bert=bert
    )
    summary = label_files(
        [str(path) for path in inputs],
        out,
        rule=rule,
        encoder=encoder,
        without_bert=without_bert,
        columns=columns,
        sheet=sheet,
        overwrite=overwrite,
    )
    if summary.text:
        print(summary.text)
    print(summary.line)


def _role(text: str) -> tuple[str, str]:
    role, separator, name = text.partition("=")
    if not separator or not name:
        raise UserError(f"--column {text}: expected ROLE=NAME, such as --column gold=answer_text")
    return role, name


exar.command(name="run")(job_command("exar-run", limit="data.limit"))
exar.command(name="merge")(job_command("exar-merge"))
exar.command(name="refine")(job_command("exar-refine", limit="data.limit"))
exar.command(name="evaluate")(job_command("exar-evaluate"))
exar.command(name="judge")(job_command("exar-judge"))

if __name__ == "__main__":
    exar()
