"""`make vote`: the page in a real browser, requests from elsewhere, and a model as a voter."""

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from review.votes import Pair, read_votes
from stages.runtime.errors import UserError
from tools.judge import ask_judge
from tools.vote import Ballot, parse_port
from tools.vote_server import HOST, VoteServer

HOSTILE = '<img src=x onerror="document.title=1"><b>"\'&'
PAIRS = [Pair(f"id{n}", f"Say {n}.{HOSTILE}", f"old {n}{HOSTILE}", f"new {n}") for n in range(4)]
FILE = Path("votes/a..b.jsonl")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ballot(voter: str = "Ann", voter_id: str = "1") -> Ballot:
    return Ballot(PAIRS, FILE, voter, voter_id, ("main", "slow"))


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def choices(voter: str = "Ann") -> dict[str, str]:
    return {vote.example_id: vote.choice for vote in read_votes(FILE, PAIRS) if vote.voter == voter}


def side(pair: Pair, text: str) -> str:
    return "before" if text == pair.before else "after"


@pytest.mark.subprocess
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome")
def test_the_page_in_a_browser() -> None:
    from playwright.sync_api import expect, sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with running(VoteServer(ballot(), 0)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        page = browser.new_page(viewport={"width": 375, "height": 667})  # a phone
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(url)
        by_prompt = {pair.prompt: pair for pair in PAIRS}
        expected: dict[str, str] = {}
        count = page.locator("#count")
        expect(count).to_have_text("0 of 4")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

        def shown() -> tuple[Pair, list[str]]:
            """The pair on the page, and its answers in their order there. Markup in them is shown as text."""
            pair = by_prompt[page.locator("#prompt pre").inner_text()]
            answers = page.locator(".answer pre").all_inner_texts()
            assert sorted(answers) == sorted([pair.before, pair.after])
            return pair, answers

        pair, answers = shown()
        expected[pair.example_id] = side(pair, answers[0])
        page.keyboard.press("1")
        expect(count).to_have_text("1 of 4")
        assert choices() == expected

        page.keyboard.press("u")  # undo
        expect(count).to_have_text("0 of 4")
        assert choices() == {}
        assert shown() == (pair, answers)
        expected[pair.example_id] = side(pair, answers[1])
        page.keyboard.press("2")
        expect(count).to_have_text("1 of 4")

        skipped, _ = shown()
        page.keyboard.press(" ")  # skip
        expect(page.locator("#prompt pre")).not_to_have_text(skipped.prompt)
        pair, _ = shown()
        expected[pair.example_id] = "equal"
        page.keyboard.press("0")
        expect(count).to_have_text("2 of 4")
        assert choices() == expected

        page.reload()  # closing and opening the page again shows the same prompt
        pair, answers = shown()
        expected[pair.example_id] = side(pair, answers[1])
        page.locator(".answer").nth(1).click()
        expect(count).to_have_text("3 of 4")
        assert shown()[0] == skipped  # at the end again
        for secret in ("main", "slow", "before", "after"):
            assert secret not in page.locator("body").inner_text()
        page.locator("#reveal").click()
        expect(page.locator("#message")).to_contain_text("Your votes: slow ")
        expect(page.locator("#ballot")).to_be_hidden()
        assert choices() == expected
        assert errors == []
        assert page.title() == "Vote"
        browser.close()


def test_a_voter_who_comes_back_goes_on_with_the_same_prompts_and_can_undo_earlier_votes() -> None:
    first = ballot()
    pair = first.state()["pair"]
    first.vote(pair["id"], "1")
    first.vote(pair["id"], "1")  # a second click
    again = ballot()
    assert again.state() == first.state()
    assert (again.state()["voted"], again.state()["total"]) == (1, 4)
    again.undo()
    assert again.state()["pair"] == pair
    assert choices() == {}
    again.undo()  # nothing is left


def test_the_order_of_prompts_and_answers_differs_between_voters() -> None:
    def orders(voter: str) -> list[Any]:
        own = ballot(voter)
        return [(pair, own.in_order(PAIRS[int(pair[2:])])) for pair in own.left]

    found = [orders(f"voter {n}") for n in range(40)]
    firsts = [order[0] for own in found for _, order in own]
    assert 0.3 < firsts.count("before") / len(firsts) < 0.7
    assert len({own[0][0] for own in found}) == 4


def test_several_voters_share_a_file_and_two_of_the_same_name_are_refused() -> None:
    for name in ("Ann", "Bob"):
        own = ballot(name)
        own.vote(own.left[0], "0")
    assert [vote.voter for vote in read_votes(FILE, PAIRS)] == ["Ann", "Bob"]
    with pytest.raises(UserError) as error:
        ballot("Ann", voter_id="2")
    assert str(error.value) == (
        "votes/a..b.jsonl: another person of the name 'Ann' has voted, with another e-mail address in git; choose "
        "another name: make vote VOTER=..."
    )


def test_after_the_models_are_revealed_nothing_can_be_voted_or_undone() -> None:
    own = ballot()
    own.vote(own.left[0], "0")
    own.reveal()
    own.vote(own.left[0], "0")
    own.undo()
    assert len(choices()) == 1
    assert own.state()["pair"] is None
    assert own.state()["result"] == (
        "Your votes: slow 0, main 0, equal 1. Share of slow among the decided: 0% to 100% (95% confidence sequence)."
    )


VOTE = {"id": "id0", "answer": "1"}


def with_changes(**changes: str) -> Callable[[str], dict[str, str]]:
    def headers(url: str) -> dict[str, str]:
        return {"Origin": url, "Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in changes.items()
        }

    return headers


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        (with_changes(Origin="http://example.com"), VOTE, 403),
        (with_changes(Origin="null"), VOTE, 403),
        (with_changes(Content_Type="text/plain"), VOTE, 403),  # a browser sends this type from any site without asking
        (with_changes(Host="example.com"), VOTE, 403),  # a name that resolves to this machine
        (with_changes(), {"id": "id0", "answer": "3"}, 400),
        (with_changes(), [1], 400),
        (with_changes(), VOTE, 200),
    ],
)
def test_only_the_page_itself_can_send_votes(headers: Any, content: Any, status: int) -> None:
    with running(VoteServer(ballot(), 0)) as url:
        response = httpx2.post(f"{url}/vote", json=None, content=json.dumps(content), headers=headers(url))
        assert response.status_code == status
        page = httpx2.get(url)
        assert httpx2.get(url, headers={"Host": "example.com"}).status_code == 403
        assert httpx2.get(f"{url}/nothing").status_code == 404
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; form-action 'none'; connect-src 'self'; script-src 'nonce-")
    assert "unsafe" not in policy
    assert "NONCE" not in page.text


def test_a_vote_file_that_was_damaged_meanwhile_is_reported_on_the_page() -> None:
    own = ballot()
    own.vote(own.left[0], "0")
    with running(VoteServer(own, 0)) as url:
        FILE.write_text("{")
        response = httpx2.get(f"{url}/state")
    with pytest.raises(UserError):
        own.vote(own.left[0], "0")
    FILE.write_text("")
    assert (own.state()["voted"], len(own.left)) == (0, 3)  # the prompt of the vote that failed is shown again
    assert response.status_code == 409
    assert response.text.startswith("votes/a..b.jsonl:1: not a vote: ")


@pytest.mark.parametrize("port", ["", "0", "99999", "x"])
def test_an_invalid_port_is_reported(port: str) -> None:
    with pytest.raises(UserError, match=f"^PORT: found '{port}'; must be a number from 1 to 65535$"):
        parse_port(port)


def test_a_port_in_use_is_reported() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as error:
            VoteServer(ballot(), port)
    assert str(error.value) == f"port {port} is in use; close its program, or choose another: make vote PORT=..."


@contextmanager
def endpoint(reply: Callable[[str], str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of an OpenAI-compatible API whose chat completions are what `reply` returns for a message."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message = {"role": "assistant", "content": reply(requests[-1]["messages"][0]["content"])}
            content = json.dumps({"choices": [{"message": message}]}).encode()
            self.send_response(200 if self.path == "/v1/chat/completions" else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(ConnectionError):  # the judge's client may have given up
                self.wfile.write(content)

    with running(ThreadingHTTPServer((HOST, 0), Handler)) as url:
        yield f"{url}/v1", requests


def test_a_judge_is_asked_in_both_orders_and_its_choice_counts_if_it_is_the_same_in_both() -> None:
    def prefer_new_but_the_first_for_prompt_2(message: str) -> str:
        first = message.split("<answer number=")[1]
        if "Say 2." in message:
            return "1"
        return "<think>Hm, 2?</think>\n**1**" if "new" in first else " 2."

    with endpoint(prefer_new_but_the_first_for_prompt_2) as (url, requests):
        ask_judge(PAIRS[:2], FILE, url, "m")
        ask_judge(PAIRS, FILE, url, "m")  # the first two are not asked again
    assert len(requests) == 8
    assert requests[0]["model"] == "m"
    assert choices("judge m") == {"id0": "after", "id1": "after", "id2": "equal", "id3": "after"}


def test_a_judge_that_can_not_be_used_is_reported_and_its_votes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def message(url: str, model: str = "m") -> str:
        with pytest.raises(UserError) as error:
            ask_judge(PAIRS, FILE, url, model)
        return str(error.value)

    replies = {"Say 1.": "Both are nice.", "Say 2.": "2 answers are wrong"}
    with endpoint(lambda text: next((reply for key, reply in replies.items() if key in text), "0")) as (url, _):
        assert message(url) == (
            "JUDGE: 2 of 4 prompts have no vote; the first: found the reply 'Both are nice.'; must be 1, 2 or 0; use a "
            "model that follows instructions"
        )
        assert choices("judge m") == {"id0": "equal", "id3": "equal"}
        wrong = url.removesuffix("/v1")
        assert message(wrong).startswith(f"JUDGE: {wrong}: Client error '404")
    assert message(url).startswith(f"JUDGE: {url}: [Errno 111] Connection refused; must be an OpenAI-compatible API")
    assert message(url, "") == "the model of the judge is not known; set it: make vote JUDGE=URL JUDGE_MODEL=NAME"
    assert message("nonsense").startswith("JUDGE: nonsense: Request URL is missing an 'http://' or 'https")
    assert message("http://[::1").startswith("JUDGE: http://[::1: Invalid")
    monkeypatch.setattr("tools.judge.TIMEOUT", 0.05)
    silent = threading.Event()
    with endpoint(lambda _: str(silent.wait(5))) as (url, _):
        assert message(url).startswith(f"JUDGE: {url}: no reply within 0.05 s; must be an OpenAI")
        silent.set()
