"""Texts: complete characters, no part of a stop string, and equal to decoding everything at once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from mixtral_serve.engine.fakes import EOS_TOKEN_ID, FIRST_BYTE_TOKEN_ID, FakeRunner, FakeScript, byte_ids
from mixtral_serve.text.detokenizer import TokenBytes

# Few characters, one to four bytes long, so that stop strings overlap with each other and with themselves.
texts = st.text(alphabet="ab é世🙂", max_size=40)
stop_strings = st.lists(st.text(alphabet="ab é世🙂\ufffd", min_size=1, max_size=5), max_size=4).map(tuple)


def cut_at_first_stop(text: str, stops: tuple[str, ...], *, include: bool) -> tuple[str, bool]:
    """The naive reference: look at ever longer beginnings of the whole text until one ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end if include else end - len(max(ending, key=len))], True
    return text, False


def vocabulary_of(data: bytes, cuts: list[int]) -> tuple[TokenBytes, list[int]]:
    """Cuts ``data`` at the given places; each piece is a token of its own."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    pieces = [data[a:b] for a, b in pairwise(places)]
    ids = list(range(FIRST_BYTE_TOKEN_ID, FIRST_BYTE_TOKEN_ID + len(pieces)))
    table = {0: b"<unk>", 1: b"<s>", EOS_TOKEN_ID: b"</s>", **dict(zip(ids, pieces, strict=True))}
    return TokenBytes(table, special_ids=(0, 1, 2)), ids


@given(
    text=texts,
    cuts=st.lists(st.integers(0, 200), max_size=60),
    stops=stop_strings,
    include=st.booleans(),
    max_tokens=st.integers(1, 60),
)
@example(text="🙂", cuts=[1, 2, 3], stops=(), include=False, max_tokens=50)
@example(text="aab", cuts=[1, 2], stops=("ab",), include=False, max_tokens=50)
@example(text="aé", cuts=[1, 2], stops=("a\ufffd",), include=False, max_tokens=2)
def test_row69_i28_text_is_all_tokens_decoded_minus_stop_and_never_part_of_either(
    new_driver, text, cuts, stops, include, max_tokens
):
    table, ids = vocabulary_of(text.encode(), cuts)
    runner = FakeRunner(FakeScript(), vocab_size=300, output_ids=ids)
    driver = new_driver(runner=runner, table=table)
    driver.submit("a", [1], max_tokens=max_tokens, stop=stops, include_stop=include)
    driver.run()

    num_bytes = sum(len(table[token_id]) for token_id in ids[:max_tokens])
    said = text.encode()[:num_bytes].decode(errors="replace")
    expected, stopped = cut_at_first_stop(said, stops, include=include)
    assert driver.text("a") == expected
    assert driver.end("a") == ("stop" if stopped or len(ids) < max_tokens else "length")
    assert driver.last("a").num_output_tokens == len(driver.tokens("a"))
    emitted = ""
    for delta in driver.deltas["a"]:
        emitted += delta.text
        if delta.finish_reason is None:
            assert "\ufffd" not in delta.text, "half a character was let out"
            assert expected.startswith(emitted), "part of a stop string was let out"


def test_tokens_of_a_removed_stop_string_are_counted_and_their_request_ends_in_the_same_step(new_driver):
    driver = new_driver(FakeScript(output="Hello END and more"))
    driver.submit("a", max_tokens=50, stop=("END",))
    driver.run()
    assert (driver.text("a"), driver.end("a")) == ("Hello ", "stop")
    assert driver.last("a").num_output_tokens == len("Hello END")
    assert driver.last_tick.stats.num_steps == len("Hello END")


def test_a_beginning_that_came_to_nothing_is_said_at_the_end(new_driver):
    driver = new_driver(FakeScript(output="Hello EN"))
    driver.submit("a", max_tokens=50, stop=("END",))
    driver.submit("cut", max_tokens=7, stop=("END",))
    driver.run()
    assert driver.text("a") == "Hello EN"
    assert driver.text("cut") == "Hello E"


def test_a_stop_token_has_no_text_unless_stops_are_included(new_driver):
    driver = new_driver(FakeScript(output="one; two"))
    semicolon = byte_ids(";")
    driver.submit("out", max_tokens=50, stop_token_ids=semicolon)
    driver.submit("in", max_tokens=50, stop_token_ids=semicolon, include_stop=True)
    driver.run()
    assert (driver.text("out"), driver.text("in")) == ("one", "one;")
    assert driver.tokens("out") == driver.tokens("in") == list(byte_ids("one;"))


def test_stops_count_only_after_min_tokens_and_what_did_not_count_is_text(new_driver):
    driver = new_driver(FakeScript(output="a;a;a;a"))
    for min_tokens, expected in ((0, "a"), (2, "a"), (3, "a;a"), (4, "a;a"), (5, "a;a;a")):
        for name, fields in (("token", {"stop_token_ids": byte_ids(";")}), ("string", {"stop": (";",)})):
            key = f"{name}{min_tokens}"
            driver.submit(key, max_tokens=50, min_tokens=min_tokens, **fields)
            driver.run()
            assert driver.text(key) == expected, key


def test_special_tokens_are_silent_unless_asked_for(new_driver):
    driver = new_driver(FakeScript(output_ids=(*byte_ids("a"), 1, *byte_ids("b"))))
    driver.submit("skip")
    driver.submit("show", skip_special_tokens=False)
    driver.run()
    assert (driver.text("skip"), driver.text("show")) == ("ab", "a<s>b")


def test_one_leading_space_is_dropped_where_asked_for(new_driver):
    driver = new_driver(FakeScript(output="  two"))
    driver.submit("chat", strip_leading_space=True)
    driver.submit("completion")
    driver.run()
    assert (driver.text("chat"), driver.text("completion")) == (" two", "  two")


def test_a_cancelled_request_says_what_it_held_back_and_nothing_more(new_driver):
    driver = new_driver(FakeScript(output="Hello END"))
    driver.submit("a", max_tokens=50, stop=("END",))
    for _ in range(8):
        driver.tick()
    driver.cancel("a")
    driver.run()
    assert (driver.text("a"), driver.end("a")) == ("Hello EN", "cancelled")
