"""`make vote`: the page in a real browser, requests from elsewhere, and a model as a voter."""

import errno
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from filelock import FileLock

from review.votes import VOTES_LOCK, Pair, read_votes
from stages.runtime.errors import UserError
from tests.hub_server import running
from tools.judge import ask_judge
from tools.vote import Ballot, main, parse_port
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


def choices(voter: str = "Ann") -> dict[str, str]:
    return {vote.example_id: vote.choice for vote in read_votes(FILE, PAIRS) if vote.voter == voter}


def side(pair: Pair, text: str) -> str:
    return "before" if text == pair.before else "after"


@pytest.fixture
def page() -> Iterator[Any]:
    """A page in a browser, of the size of a phone."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser.new_page(viewport={"width": 375, "height": 667})
        browser.close()


@pytest.mark.subprocess
def test_the_page_in_a_browser(page: Any) -> None:
    from playwright.sync_api import expect

    with running(VoteServer(ballot(), 0)) as url:
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
            expect(page.locator("#prompt pre")).not_to_have_text("")  # until the page has its state
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


@contextmanager
def disk_full() -> Iterator[None]:
    def fail(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as context:
        context.setattr("review.votes.write_text", fail)
        yield


NOT_SAVED = (
    "not saved: votes/a..b.jsonl: No space left on device; free some space or make votes/ and .scratch/ writable, then "
    "try again"
)


@pytest.mark.subprocess
def test_a_vote_that_can_not_be_saved_stays_on_the_page_with_the_reason_and_can_be_given_again(page: Any) -> None:
    from playwright.sync_api import expect

    server = VoteServer(ballot(), 0)
    page.set_viewport_size({"width": 375, "height": 300})
    with running(server) as url:
        page.goto(url)
        prompt, message, count = page.locator("#prompt pre"), page.locator("#message"), page.locator("#count")
        expect(count).to_have_text("0 of 4")
        first = prompt.inner_text()
        page.evaluate("window.scrollTo(0, 9999)")
        with disk_full():
            page.keyboard.press("1")
            expect(message).to_have_text(NOT_SAVED)
            expect(message).to_be_in_viewport()
        assert (prompt.inner_text(), count.inner_text()) == (first, "0 of 4")
        page.keyboard.press("1")
        expect(count).to_have_text("1 of 4")
        expect(message).to_have_text("")
        with disk_full():
            page.keyboard.press("u")
            expect(message).to_have_text(NOT_SAVED)
        assert len(choices()) == 1
        page.keyboard.press("u")
        expect(count).to_have_text("0 of 4")
        assert prompt.inner_text() == first
        server.shutdown()
        server.server_close()
        page.keyboard.press("1")
        expect(message).to_contain_text(
            "No reply from the server. Start `make vote` again, then repeat the last answer"
        )
        assert prompt.inner_text() == first


def test_any_error_of_the_disk_is_a_message_and_neither_a_vote_nor_an_undo_is_lost(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(path: str, **content: str) -> tuple[int, str]:
        response = httpx2.post(f"{url}/{path}", json=content, headers={"Origin": url})
        return response.status_code, response.text

    voting = ballot()
    example_id = voting.left[0]
    with running(VoteServer(voting, 0)) as url:
        with disk_full():
            assert send("vote", id=example_id, answer="1") == (409, NOT_SAVED)
        shutil.rmtree(".scratch")
        Path(".scratch").write_text("")  # a file where the folder of the lock would be
        status, text = send("vote", id=example_id, answer="1")
        assert (status, text[:44]) == (409, "not saved: .scratch: File exists; free some ")
        Path(".scratch").unlink()
        with monkeypatch.context() as context, FileLock(VOTES_LOCK):  # another process holds it
            context.setattr("review.votes.LOCK_TIMEOUT", 0.01)
            status, text = send("vote", id=example_id, answer="1")
        assert (status, text[:30]) == (409, "not saved: votes/a..b.jsonl: T")
        assert send("vote", id=example_id, answer="1")[0] == 200
        with disk_full():
            assert send("undo") == (409, NOT_SAVED)
        assert len(choices()) == 1
        FILE.unlink()
        FILE.mkdir()
        for path in ("undo", "reveal"):
            assert send(path)[0] == 409
        assert httpx2.get(f"{url}/state").text == ("votes/a..b.jsonl: Is a directory; check it and run again")
    assert capfd.readouterr() == ("", "")


def test_a_page_that_is_closed_before_it_has_the_reply_is_not_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with VoteServer(ballot(), 0) as server:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            server.handle_error(None, None)
    assert capfd.readouterr() == ("", "")


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
        voting = ballot(voter)
        return [(pair, voting.in_order(PAIRS[int(pair[2:])])) for pair in voting.left]

    found = [orders(f"voter {n}") for n in range(40)]
    firsts = [order[0] for voting in found for _, order in voting]
    assert 0.3 < firsts.count("before") / len(firsts) < 0.7
    assert len({voting[0][0] for voting in found}) == 4


def test_several_voters_share_a_file_and_two_of_the_same_name_are_two() -> None:
    people = [("Ann", "1"), ("$(x) $HOME", "1"), ("Ann", "2")]
    for name, voter_id in people:
        voting = ballot(name, voter_id)
        assert (voting.state()["voted"], voting.state()["canUndo"]) == (0, False)
        voting.vote(voting.left[0], "0")
    assert [vote.identity for vote in read_votes(FILE, PAIRS)] == people
    again = ballot("Ann", "1")
    assert again.state()["voted"] == 1
    again.undo()
    again.undo()  # nothing is left; the votes of the other Ann stay
    assert [vote.identity for vote in read_votes(FILE, PAIRS)] == people[1:]


def test_an_undo_deletes_all_votes_of_the_person_on_these_answers_to_the_prompt() -> None:
    voting = ballot()
    voting.vote(voting.left[0], "0")
    line = FILE.read_text()
    other = line.replace('"before": "', '"before": "0')
    FILE.write_text(line + other + line)  # merged from two clones
    ballot().undo()
    assert FILE.read_text() == other


def test_after_the_models_are_revealed_nothing_can_be_voted_or_undone() -> None:
    voting = ballot()
    voting.vote(voting.left[0], "0")
    voting.reveal()
    voting.vote(voting.left[0], "0")
    voting.undo()
    assert len(choices()) == 1
    assert voting.state()["pair"] is None
    assert voting.state()["result"] == (
        "Your votes: slow 0, main 0, equal 1. Share of slow among the decided: 0% to 100% (95% confidence sequence)."
    )


VOTE = {"id": "id0", "answer": "1"}


@pytest.mark.parametrize(
    ("changes", "content", "status"),
    [
        ({"Origin": "http://example.com"}, VOTE, 403),
        ({"Origin": "null"}, VOTE, 403),
        ({"Content-Type": "text/plain"}, VOTE, 403),  # a browser sends this type from any site without asking
        ({"Host": "example.com"}, VOTE, 403),  # a name that resolves to this machine
        ({}, {"id": "id0", "answer": "3"}, 400),
        ({}, [1], 400),
        ({}, VOTE, 200),
    ],
)
def test_only_the_page_itself_can_send_votes(changes: dict[str, str], content: Any, status: int) -> None:
    with running(VoteServer(ballot(), 0)) as url:
        headers = {"Origin": url, "Content-Type": "application/json"} | changes
        response = httpx2.post(f"{url}/vote", content=json.dumps(content), headers=headers)
        assert response.status_code == status
        page = httpx2.get(url)
        assert httpx2.get(url, headers={"Host": "example.com"}).status_code == 403
        assert httpx2.get(f"{url}/nothing").status_code == 404
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; form-action 'none'; connect-src 'self'; script-src 'nonce-")
    assert "unsafe" not in policy
    assert "NONCE" not in page.text


def test_a_vote_file_that_was_damaged_meanwhile_is_reported_on_the_page() -> None:
    voting = ballot()
    voting.vote(voting.left[0], "0")
    with running(VoteServer(voting, 0)) as url:
        FILE.write_text("{")
        response = httpx2.get(f"{url}/state")
    with pytest.raises(UserError):
        voting.vote(voting.left[0], "0")
    FILE.write_text("")
    assert (voting.state()["voted"], len(voting.left)) == (0, 3)  # the prompt of the vote that failed is shown again
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
    assert str(error.value) == (
        f"port {port} can't be opened: Address already in use; close the program that uses it, or choose another: make "
        "vote PORT=..."
    )


def test_the_command_notes_votes_on_other_answers_and_identifies_the_voter_by_name_and_e_mail_address(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def vote_once(ballot: Ballot, port: int) -> None:
        assert port == 8765
        ballot.vote(ballot.left[0], "0")

    monkeypatch.setattr("tools.vote.Revision", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr("tools.vote.find_pairs", lambda before, after: (PAIRS, FILE))
    monkeypatch.setattr("tools.vote.git_config", {"user.name": "Ann", "user.email": "ann@example.com"}.get)
    monkeypatch.setattr("tools.vote.serve", vote_once)
    monkeypatch.setattr("sys.argv", ["vote", "main", "--voter", "A $(x)"])
    Path("votes").mkdir()
    Path("votes/c..d.jsonl").write_text("{}\n\n{}\n")
    main()
    printed = capsys.readouterr().out
    assert printed.startswith(
        "Votes in votes/ on other answers than those of these revisions, which do not count: 2.\n"
    )
    assert "1 of 4 prompts: more votes are needed" in printed
    assert [vote.identity for vote in read_votes(FILE, PAIRS)] == [("A $(x)", "71d4f55f")]


@pytest.mark.parametrize("option", ["--voter", "--judge-model"])
def test_a_name_that_can_not_be_printed_is_reported(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setattr("sys.argv", ["vote", "main", option, "A\udcff"])
    name = option[2:].upper().replace("-", "_")
    with pytest.raises(UserError, match=rf"^{name}: found 'A\\udcff'; must have printable characters only$"):
        main()


Reply = str | tuple[int, dict[str, str], str]  # an answer, or a status with headers and a body


@contextmanager
def endpoint(reply: Callable[[str], Reply]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of an OpenAI-compatible API whose chat completions are what `reply` returns for a message."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = reply(requests[-1]["messages"][0]["content"])
            if isinstance(answer, str):
                content = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                answer = 200, {}, json.dumps(content)
            status, headers, body = answer
            if self.path != "/v1/chat/completions":
                status, body = 404, "no such path"
            body = body.replace("AUTHORIZATION", self.headers.get("Authorization", ""))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            with suppress(ConnectionError):  # the judge's client may have given up
                self.wfile.write(body.encode())

    with running(ThreadingHTTPServer((HOST, 0), Handler)) as url:
        yield f"{url}/v1", requests


def judge_error(url: str, model: str = "m") -> str:
    with pytest.raises(UserError) as error:
        ask_judge(PAIRS, FILE, url, model)
    return str(error.value)


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


def test_a_judge_that_can_not_be_used_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoint(lambda _: "0") as (url, _):
        wrong = url.removesuffix("/v1")
        assert judge_error(wrong).startswith(f"JUDGE: {wrong}: HTTP 404: no such path; must be an OpenAI-compatible")
    assert judge_error(url).startswith(f"JUDGE: {url}: [Errno 111] Connection refused; must be an OpenAI-compatible")
    assert judge_error(url, "") == "the model of the judge is not known; set it: make vote JUDGE=URL JUDGE_MODEL=NAME"
    for invalid in ("nonsense", "http://[::1", "http://me:hunter/22@host"):
        message = judge_error(invalid)
        assert message.startswith("JUDGE: not a URL; must be an OpenAI-compatible API, such as http://127.0.0.1:8080")
        assert "hunter" not in message
    monkeypatch.setattr("tools.judge.TIMEOUT", 0.05)
    silent = threading.Event()
    with endpoint(lambda _: str(silent.wait(5))) as (url, _):
        assert judge_error(url).startswith(f"JUDGE: {url}: no reply within 0.05 s; must be an OpenAI")
        silent.set()
    monkeypatch.setenv("ALL_PROXY", "ftp://me:hunter22@host")  # kingfisher:ignore
    assert judge_error(url) == "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY: must be a URL like http://host:port, or not set"


TOO_LONG: Reply = (400, {}, json.dumps({"error": {"message": "Too long:\n\x1b[1m9 tokens", "type": "x"}}))


def test_a_prompt_without_a_vote_does_not_block_the_others_and_the_message_has_the_reasons() -> None:
    replies: dict[str, Reply] = {"Say 1.": TOO_LONG, "Say 2.": "2 answers are wrong", "Say 3.": TOO_LONG}
    with endpoint(lambda text: next((reply for key, reply in replies.items() if key in text), "0")) as (url, _):
        assert judge_error(url) == (
            "JUDGE: 3 of 4 prompts have no vote. The most frequent reasons: HTTP 400: Too long: \\x1b[1m9 tokens "
            "(2); the reply '2 answers are wrong' is not 1, 2 or 0 (1). Run again to retry them, or use "
            "another model"
        )
        assert choices("judge m") == {"id0": "equal"}
        replies.clear()
        ask_judge(PAIRS, FILE, url, "m")
    assert len(choices("judge m")) == 4


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (413, '{"error": "too large"}', "HTTP 413: too large"),  # Ollama
        (422, '{"object": "error", "message": "not allowed"}', "HTTP 422: not allowed"),  # vLLM
        (422, '{"detail": [{"msg": "too long"}]}', "HTTP 422: [{'msg': 'too long'}]"),  # FastAPI
        (500, "out of memory " + 300 * "x", "HTTP 500: out of memory " + 286 * "x"),
        (502, "", "HTTP 502: Bad Gateway"),
        (200, '{"error": {"message": "filtered", "code": 400}}', "HTTP 200: filtered"),  # OpenRouter
        (200, '{"choices": []}', "HTTP 200: {'choices': []}"),
    ],
)
def test_the_message_of_a_server_that_refuses_a_prompt_is_shown(status: int, body: str, message: str) -> None:
    with endpoint(lambda _: (status, {}, body)) as (url, _):
        assert judge_error(url).startswith(
            f"JUDGE: 4 of 4 prompts have no vote. The most frequent reasons: {message} (4). Run again"
        )


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        *[(status, '{"error": {"message": "No."}}', f"HTTP {status}: No.") for status in (301, 401, 402, 403, 404)],
        (200, "<html>", "the reply is not a chat completion"),
    ],
)
def test_a_server_that_refuses_all_prompts_or_is_no_api_is_asked_once(status: int, body: str, message: str) -> None:
    with endpoint(lambda _: (status, {}, body)) as (url, requests):
        assert judge_error(url).startswith(f"JUDGE: {url}: {message}; must be an OpenAI-compatible API")
    assert len(requests) == 1


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the judge has waited, without the time they take."""
    found: list[float] = []
    monkeypatch.setattr("time.sleep", found.append)
    return found


def test_a_judge_that_is_busy_is_asked_again_after_the_time_it_says(waits: list[float]) -> None:
    headers = ["7", "9999", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", ""]
    statuses = iter([429, 503, 429, 200, 429, 429, *[200] * 20])

    def reply(message: str) -> Reply:
        status = next(statuses)
        return "0" if status == 200 else (status, {"Retry-After": headers.pop(0)}, "")

    with endpoint(reply) as (url, _):
        ask_judge(PAIRS, FILE, url, "m")
    assert waits == [7.0, 60.0, 0.0, 2.0, 4.0]
    assert len(choices("judge m")) == 4


def test_a_judge_that_stays_busy_is_waited_for_once_and_reported_once(waits: list[float]) -> None:
    with endpoint(lambda _: (429, {}, '{"error": {"message": "You exceeded your quota"}}')) as (url, requests):
        assert judge_error(url).startswith(
            "JUDGE: 4 of 4 prompts have no vote. The most frequent reasons: HTTP 429: You exceeded your quota (4). "
        )
    assert waits == [2.0, 4.0, 8.0]
    assert len(requests) == 7  # four for the first prompt, then one for each


@pytest.mark.parametrize(
    "reply",
    [
        (401, {}, '{"error": {"message": "wrong: AUTHORIZATION, sk-12345678, hunter22/"}}'),
        (400, {}, "wrong: AUTHORIZATION, sk-12345678, hunter22/"),
        "wrong: AUTHORIZATION, sk-12345678, hunter22/",
        (404, {}, "wrong: AUTHORIZATION, http://me:hunter22%2F@host"),  # kingfisher:ignore
    ],
)
@pytest.mark.parametrize("login", ["me:hunter22%2F@", ""])
def test_no_message_has_a_key_or_a_password(monkeypatch: pytest.MonkeyPatch, reply: Reply, login: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-12345678\n")
    with endpoint(lambda _: reply) as (url, _):
        message = judge_error(url.replace("//", f"//{login}"))
    secrets = ["hunter22%2F", "bWU6aHVudGVyMjIv", "sk-12345678", *(["hunter22/"] if login else [])]
    assert "wrong: " in message
    assert [secret for secret in secrets if secret in message] == []
    if login:
        assert judge_error(url.replace("//", f"//{login}")).startswith(f"JUDGE: {url}: [Errno 111] Connection refused")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-12\n34")
    assert judge_error(url) == "OPENAI_API_KEY: has other characters than printable ASCII; set it again"


def test_a_vote_of_a_judge_that_can_not_be_saved_is_reported() -> None:
    with endpoint(lambda _: "0") as (url, _), disk_full():
        assert judge_error(url) == NOT_SAVED
