"""The verbs about people and their judge: judge, review, suggest, assist."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.config import Config
from common.errors import UserError
from common.rundir import RunDirectory
from sim.cli.options import (
    CheckpointOption,
    JsonOption,
    RunArgument,
    SetOption,
    console_for,
    print_json,
)
from sim.cli.terminal import Terminal
from sim.process.open_run import open_run

if TYPE_CHECKING:
    from common.data.icd import DiagnosisIndex
    from sim.assist.patient_form import PatientRequest
    from sim.assist.suggest import ReferenceData

review_app = typer.Typer(no_args_is_help=True, help="Blinded packets for clinicians.")

OptionalRun = Annotated[
    Path | None,
    typer.Argument(metavar="[RUN]", help="Run directory; default the newest finished below runs."),
]
ModelsOption = Annotated[
    list[str] | None,
    typer.Option("--list-by", help="Whose lists, for instance fedrx; may be repeated."),
]
PersonalOption = Annotated[
    str,
    typer.Option("--personal", help="Hospital whose own B is added; no epsilon covers its lists."),
]


def judge(
    run: RunArgument,
    models: ModelsOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print calls, tokens and cost; send nothing.")
    ] = False,
    max_cost_usd: Annotated[
        float | None, typer.Option("--max-cost-usd", min=0, help="Stop before it costs more.")
    ] = None,
    agreement_host: Annotated[
        str, typer.Option(help="Host that an agreement lets get credentialed data.")
    ] = "",
    agreement: Annotated[str, typer.Option(help="That agreement; stored with the run.")] = "",
    retry_refused: Annotated[
        bool, typer.Option("--retry-refused", help="Ask again what the server did not take.")
    ] = False,
    set_: SetOption = None,
    json_output: JsonOption = False,
) -> None:
    """Let an LLM judge each suggested drug: suitable or not."""
    from common.evaluation.judge.questions import estimate
    from sim.answers.judge import estimate_text, judgement_parts, prepare, require_scores
    from sim.answers.judge import judge as ask_judge
    from sim.runs.stages import after_training

    overrides = list(set_ or ())
    if max_cost_usd is not None:
        overrides.append(f"judge.max-cost-usd={max_cost_usd!r}")
    directory = open_run(run)
    prepared = prepare(
        directory,
        overrides=overrides,
        predicted_by=models or (),
        agreement_host=agreement_host,
        agreement=agreement,
        dry_run=dry_run,
        retry_refused=retry_refused,
    )
    console = console_for(json_output)
    if dry_run:
        figures = estimate(directory, prepared)
        console.say(estimate_text(figures))
        print_json(figures.as_json(), json_output)
        return
    again = ["fedrx", "judge"]
    again += [word for key in overrides for word in ("--set", key)]
    again += [word for name in models or () for word in ("--list-by", name)]
    again += ["--agreement-host", agreement_host] if agreement_host else []
    again += ["--agreement", agreement] if agreement else []
    with after_training(directory, "the judge", shlex.join(again)):
        result = ask_judge(directory, prepared, console=console)
    console.say(*judgement_parts(result))
    _renew_report(directory)
    print_json(result.as_json(), json_output)
    require_scores(result)


@review_app.command("make")
def review_make(
    run: RunArgument,
    models: ModelsOption = None,
    cases: Annotated[int, typer.Option(min=0, help="How many cases; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of cases and of the lists' order.")] = 0,
    include_ordered: Annotated[
        bool, typer.Option(help="Show what was really ordered among the lists, as a control.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="The page; default in RUN.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Write one self-contained HTML page with blinded lists."""
    from sim.answers.review import make_review

    page = make_review(
        open_run(run),
        models=models or (),
        cases=cases,
        seed=seed,
        include_ordered=include_ordered,
        out=out,
    )
    console_for(json_output).say(
        f"page for reviewers: {page.absolute()}",
        "The key to the lists stays in the run directory.",
    )
    print_json({"page": str(page.absolute())}, json_output)


@review_app.command("import")
def review_import(
    run: RunArgument,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Downloaded reviews.")],
    json_output: JsonOption = False,
) -> None:
    """Check and score downloaded reviews, and compare reviewers and judge."""
    from sim.answers.review import import_reviews, review_parts
    from sim.process.lock import exclusive

    directory = open_run(run)
    with exclusive(directory):
        result = import_reviews(directory, files)
        _renew_report(directory)
    console_for(json_output).say(*review_parts(result))
    print_json(result.as_json(), json_output)


def suggest(
    run: OptionalRun = None,
    sex: Annotated[str, typer.Option(help="F or M (female or male).")] = "",
    age: Annotated[str, typer.Option(help="Years.")] = "",
    height: Annotated[str, typer.Option(help="cm; empty for unknown.")] = "",
    weight: Annotated[str, typer.Option(help="kg; empty for unknown.")] = "",
    diagnosis: Annotated[
        list[str] | None,
        typer.Option("--diagnosis", "-d", help="ICD code, title or free text; repeat in order."),
    ] = None,
    checkpoint: CheckpointOption = None,
    personal: PersonalOption = "",
    set_: SetOption = None,
    json_output: JsonOption = False,
) -> None:
    """Print one patient's suggested drugs (research only, not for clinical use)."""
    form = {"sex": sex, "age": age, "height": height, "weight": weight, "diagnoses": diagnosis}
    _read_form(form)
    from sim.assist.suggest import Assistant, suggestion_blocks
    from sim.report.terminal import block_parts

    console = console_for(json_output)
    directory, config, reference = _opened(run, set_, console, checkpoint, personal)
    request = _read_form(form, reference.index)
    console.say("loading the backbone ...", style="dim", error=True)
    assistant = Assistant(
        directory, config, reference=reference, checkpoint=checkpoint, personal=personal
    )
    console.say("answering ...", style="dim", error=True)
    suggestion = assistant.suggest(request)
    blocks = suggestion_blocks(directory, request, suggestion, reference)
    console.say(*block_parts(*blocks))
    print_json({"patient": request.as_dict(), **suggestion.as_dict()}, json_output)


def assist(
    run: OptionalRun = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Loopback port; 0: free.")] = 0,
    log: Annotated[
        Path | None, typer.Option("--log", help="Decisions; default decisions.jsonl in RUN.")
    ] = None,
    checkpoint: CheckpointOption = None,
    personal: PersonalOption = "",
    cds_hooks: Annotated[
        bool, typer.Option("--cds-hooks", help="Serve CDS Hooks 2.0 to a hospital system, too.")
    ] = False,
    set_: SetOption = None,
) -> None:
    """Serve the assist page on this machine alone (research only, not for clinical use)."""
    from sim.assist.cds_hooks import cds_routes
    from sim.assist.chart import require_fhir
    from sim.assist.server import (
        DECISIONS,
        PageState,
        address,
        make_server,
        open_socket,
        service_lines,
    )
    from sim.assist.suggest import Assistant, about_run

    if cds_hooks:
        require_fhir()
    console, listening = console_for(False), open_socket(port)
    directory, config, reference = _opened(run, set_, console, checkpoint, personal)
    console.say("loading the backbone ...", style="dim", error=True)
    assistant = Assistant(
        directory, config, reference=reference, checkpoint=checkpoint, personal=personal
    )
    state = PageState(
        suggester=assistant,
        decisions=(log or directory.path / DECISIONS).absolute(),
        about=about_run(directory, config, assistant.checkpoint, personal=personal),
    )
    lines: list[Any] = [
        *filter(None, [assistant.uncovered]),
        "Research only, not for clinical use. Open in a browser on this machine:",
        address(state, listening),
        f"decisions: {state.decisions}",
    ]
    services = None
    if cds_hooks:
        services = cds_routes(assistant)
        lines += service_lines(state, listening)
    console.say(*lines, "Ctrl-C stops.")
    make_server(state, listening, services=services).run(sockets=[listening])


def _read_form(
    form: Mapping[str, object], index: "DiagnosisIndex | None" = None
) -> "PatientRequest":
    """Check what was typed about a patient, without an index before anything is loaded."""
    from common.data.icd import DiagnosisIndex
    from sim.assist.patient_form import FormProblems, read_form

    try:
        return read_form(form, index or DiagnosisIndex((), frequency={}, origin=""))
    except FormProblems as error:
        raise UserError(
            str(error), fix="for instance --sex F --age 71 --height 165 --weight 80 -d I50.9 -d I10"
        ) from None


def _opened(
    run: Path | None,
    overrides: list[str] | None,
    console: Terminal,
    checkpoint: str | None,
    personal: str,
) -> "tuple[RunDirectory, Config, ReferenceData]":
    """Find the run that is named, or the newest; return it with how to answer and what is known.

    Its checkpoint is read first: what is wrong with it costs nobody the reading of data.
    """
    from client.personal import b_of
    from sim.assist.suggest import assistant_config, find_run, reference_of, within_formulary

    directory = find_run(run)
    config = assistant_config(directory, overrides or ())
    if run is None:
        console.say(f"run: {directory.path}", style="dim")
    b_of(directory, directory.load_checkpoint(checkpoint), personal)
    console.say("reading the run's data ...", style="dim", error=True)
    reference = reference_of(config, personal=personal)
    return directory, within_formulary(config, reference, overrides or ()), reference


def _renew_report(run: RunDirectory) -> None:
    """Write a run's report anew, where it has one."""
    if (run.path / "report.md").exists():
        from sim.report.run_report import write_report
        from sim.runs.stages import after_training

        with after_training(run, "the report", "fedrx report"):
            write_report(run)
