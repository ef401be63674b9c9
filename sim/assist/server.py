"""``fedrx assist``: the same list on a local page, decided by a clinician; research only.

Bound to loopback, for one person: the address carries a one-time secret that becomes a cookie, so
that other users of the machine and other pages in the same browser get nothing. Requests for
another host (DNS rebinding), from another origin, or without the cookie are refused. The page may
load nothing and connect to nothing but itself.
"""

import datetime
import os
import secrets
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from pydantic import BaseModel, Field, StringConstraints, model_validator

from common.errors import UserError
from common.files import for_owner, json_line, utf8, writable
from common.records import Record
from sim.assist.cds_hooks import LARGEST_BODY_BYTES, PREFIX
from sim.assist.patient_form import FormProblems, PatientRequest, read_form
from sim.assist.suggest import Assistant, Suggestion
from sim.pages.fill import render

HOST = "127.0.0.1"
DECISIONS = "decisions.jsonl"
_LARGEST_BODY_BYTES = 64 * 1024
_KEPT_SUGGESTIONS = 200
_LONGEST_DRUG = 200
_LONGEST_NOTE = 2000
_MOST_ADDED = 100
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(kw_only=True)
class PageState:
    """The state of one page: what it was asked, and where decisions go."""

    suggester: Assistant
    decisions: Path
    about: Mapping[str, object]
    """``run``, ``checkpoint``, ``backbone``, ``source``: shown, and stored with each decision."""
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    asked: "OrderedDict[str, tuple[PatientRequest, Suggestion]]" = field(
        default_factory=OrderedDict
    )

    def remember(self, request: PatientRequest, suggestion: Suggestion) -> str:
        """Keep a suggestion until it is decided; the oldest of many is forgotten."""
        name = secrets.token_hex(8)
        self.asked[name] = request, suggestion
        while len(self.asked) > _KEPT_SUGGESTIONS:
            self.asked.popitem(last=False)
        return name


def cookie_name(port: int) -> str:
    """Name a page's cookie: browsers share cookies over ports, and two pages may be open.

    >>> cookie_name(8080)
    'fedrx-assist-8080'
    """
    return f"fedrx-assist-{port}"


class Decision(BaseModel):
    """What a clinician makes of a list."""

    id: str = ""
    marks: list[str | None] = []
    """``keep`` or ``remove`` for each drug, in the list's order."""
    added: list[
        Annotated[
            str, StringConstraints(strip_whitespace=True, min_length=1, max_length=_LONGEST_DRUG)
        ]
    ] = Field([], max_length=_MOST_ADDED)
    note: str = Field("", max_length=_LONGEST_NOTE)
    escaped_texts: int = 0

    @model_validator(mode="before")
    @classmethod
    def _escape(cls, body: object) -> object:
        """Escape text that UTF-8 cannot hold, and count it."""
        if not isinstance(body, dict):
            return body
        texts, count = writable(body)
        return {**texts, "escaped_texts": count}


_WRONG_DECISION = {
    "id": "This list is no longer known here. Ask for a new one, then decide.",
    "marks": "The decision is not about this list. Ask again.",
    "added": f"At most {_MOST_ADDED} drugs can be added, each with a name of at most "
    f"{_LONGEST_DRUG} characters.",
    "note": f"The note is longer than {_LONGEST_NOTE} characters.",
}


def make_app(state: PageState, *, port: int, services: APIRouter | None = None) -> FastAPI:
    """Return the page's application.

    Args:
        state: Its state.
        port: Where it is served, for the check of hosts and origins.
        services: For hospital systems, from ``sim.assist.cds_hooks``.
    """
    app = FastAPI(title="FedRx assist", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(_routes(state, cookie_name(port)))
    if services:
        app.include_router(services)
    # Starlette's own check of hosts leaves the port out: this one is exact.
    hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    @app.middleware("http")
    async def guard(
        request: Request, proceed: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        refusal = _refusal(request, hosts, cookie_name(port), state.secret)
        response = refusal if refusal is not None else await proceed(request)
        response.headers.update(_HEADERS)
        return response

    @app.exception_handler(FormProblems)
    async def tell(request: Request, error: FormProblems) -> Response:
        return _problem(error.problems)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(400)
    async def tell_of_body(request: Request, error: Exception) -> Response:
        """FastAPI's own answer would quote what was typed."""
        errors = error.errors() if isinstance(error, RequestValidationError) else ()
        fields = {part for one in errors for part in one["loc"]}
        wrong = [text for field, text in _WRONG_DECISION.items() if field in fields]
        return _problem({"decision": wrong[0]} if wrong else {"form": "This is not a form."})

    return app


def _routes(state: PageState, cookie: str) -> APIRouter:
    router, index = APIRouter(), state.suggester.reference.index
    page = render(
        "assist",
        data={
            **state.about,
            "titles": index.origin,
            "support": state.suggester.reference.note,
            "supported": state.suggester.reference.support is not None,
            "decisions": str(state.decisions),
        },
        connect="'self'",
    )

    @router.get("/")
    async def show(request: Request) -> Response:
        if "token" in request.query_params:
            response: Response = RedirectResponse("/", status_code=303)
            response.set_cookie(cookie, state.secret, httponly=True, samesite="strict", path="/")
            return response
        return HTMLResponse(page)

    @router.get("/api/diagnoses")
    async def diagnoses(q: str = "") -> list[dict[str, str]]:
        found = index.search(q[:100], limit=12)
        return [{"code": d.code, "label": d.label, "title": d.title} for d in found]

    @router.post("/api/suggest")
    async def suggest(form: dict[str, object]) -> dict[str, Any]:
        patient = read_form(form, index)
        suggestion = await run_in_threadpool(state.suggester.suggest, patient)
        return {"id": state.remember(patient, suggestion), **suggestion.as_dict()}

    @router.post("/api/decision")
    async def decide(decision: Decision) -> dict[str, object]:
        asked = state.asked.get(decision.id)
        if asked is None:
            raise FormProblems({"decision": _WRONG_DECISION["id"]})
        record = decision_record(*asked, decision)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            append_private(state.decisions, {"time": now, **state.about, **record.as_json()})
        except OSError as error:
            text = f"The decision could not be stored: {error.strerror}."
            raise FormProblems({"decision": text}) from None
        del state.asked[decision.id]
        return {"stored": str(state.decisions), "escaped_texts": decision.escaped_texts}

    return router


class DecisionRecord(Record):
    """A line of decisions.jsonl, beside the time and what the page says about the model."""

    absent_when_none = ("escaped_texts",)
    patient: dict[str, object]
    suggested: list[str]
    in_format: bool
    kept: list[str]
    removed: list[str]
    added: list[str]
    note: str
    escaped_texts: int | None


def decision_record(
    request: PatientRequest, suggestion: Suggestion, decision: Decision
) -> DecisionRecord:
    """Check a decision against the list it is about.

    Raises:
        FormProblems: If a drug is undecided, or the list is another one.
    """
    names = [drug.name for drug in suggestion.drugs]
    if len(decision.marks) != len(names):
        raise FormProblems({"decision": _WRONG_DECISION["marks"]})
    undecided = sum(mark not in ("keep", "remove") for mark in decision.marks)
    if undecided:
        raise FormProblems(
            {"decision": f"{undecided} of {len(names)} drugs are undecided: keep or remove each."}
        )
    paired = list(zip(names, decision.marks, strict=True))
    return DecisionRecord(
        patient=request.as_dict(),
        suggested=names,
        in_format=suggestion.in_format,
        kept=[name for name, mark in paired if mark == "keep"],
        removed=[name for name, mark in paired if mark == "remove"],
        added=[" ".join(name.split()) for name in decision.added],
        note=decision.note.strip(),
        escaped_texts=decision.escaped_texts or None,
    )


def append_private(target: Path, record: Mapping[str, object]) -> None:
    """Append one JSON line to a file that only its owner can read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "ab", opener=for_owner) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(utf8(json_line(record)))
        file.flush()
        os.fsync(file.fileno())


def open_socket(port: int) -> socket.socket:
    """Take a loopback port; 0 takes a free one. Who connects waits until it is served.

    Raises:
        UserError: If the port is taken.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()  # until then another process may bind it too, and end only afterwards
    except OSError as error:
        listening.close()
        raise UserError(
            f"--port {port}: {error.strerror}", allowed="a free port", fix="--port 0 takes one"
        ) from None
    return listening


def make_server(
    state: PageState, listening: socket.socket, *, services: APIRouter | None = None
) -> uvicorn.Server:
    """Return the server of the page (and of ``services``); nothing that is sent is logged.

    Its ``run(sockets=[listening])`` serves until Ctrl-C.
    """
    config = uvicorn.Config(
        make_app(state, port=listening.getsockname()[1], services=services),
        log_level="warning",
        access_log=False,
        # X-Forwarded-For and its like are believed by default: there is no proxy here.
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def address(state: PageState, listening: socket.socket) -> str:
    """Return the address with the secret, for the person who started it."""
    return f"http://{HOST}:{listening.getsockname()[1]}/?token={state.secret}"


def service_lines(state: PageState, listening: socket.socket) -> list[str]:
    """Return where hospital systems find the services, and the token that they send."""
    return [
        f"CDS Hooks 2.0: http://{HOST}:{listening.getsockname()[1]}{PREFIX}",
        f"Authorization: Bearer {state.secret}",
    ]


def _refusal(request: Request, hosts: set[str], cookie: str, secret: str) -> Response | None:
    """Return why a request is not answered; None if it is."""
    if request.headers.get("host", "") not in hosts:
        return _refused(421, "This page answers to its own address only.")
    origin = request.headers.get("origin")
    foreign = origin is not None and origin.removeprefix("http://") not in hosts
    site = request.headers.get("sec-fetch-site", "none")
    entering = request.url.path == "/" and request.method == "GET"
    service = request.url.path.startswith(PREFIX)
    if foreign or (site not in ("same-origin", "none") and not entering):
        return _refused(403, "Requests from other pages are refused.")
    if request.method == "POST":
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != "application/json":
            return _refused(415, "Send JSON.")
        length = request.headers.get("content-length", "")
        largest = LARGEST_BODY_BYTES if service else _LARGEST_BODY_BYTES
        if not length.isdigit() or int(length) > largest:
            return _problem({"form": "This is too long."})
    if service:
        return _service_refusal(request, secret)
    given = request.query_params.get("token") if entering else None
    given = given or request.cookies.get(cookie, "")
    if not secrets.compare_digest(utf8(given), utf8(secret)):
        return _refused(403, "Open the address that `fedrx assist` printed on the terminal.")
    return None


def _service_refusal(request: Request, secret: str) -> Response | None:
    """Discovery is open, as CDS Hooks has it, and says nothing of anybody."""
    if request.method == "GET":
        return None
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secrets.compare_digest(utf8(given), utf8(secret)):
        return _refused(401, "Send the token that `fedrx assist` printed: Authorization: Bearer.")
    return None


def _refused(status: int, text: str) -> Response:
    return Response(text + "\n", status_code=status, media_type="text/plain")


def _problem(problems: Mapping[str, str]) -> Response:
    return JSONResponse({"problems": dict(problems)}, status_code=422)
