"""Mistakes that people make in schedulers, each as one exact change of the source.

A mutation is a fact about the tests: "if somebody forgot this, we would notice". The list is curated; what it cannot
foresee, ``generic.py`` tries blindly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class MutationDoesNotApply(Exception):
    """The text to change is not in the file, or is there more than once: the list is out of date."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """Replace ``old`` by ``new`` in ``scheduler/<path>``; ``old`` must occur exactly once."""

    name: str
    path: str
    old: str
    new: str

    def apply(self, scheduler_folder: Path) -> None:
        """Change the copy in ``scheduler_folder``.

        Raises:
            MutationDoesNotApply: ``old`` does not occur exactly once.
        """
        file = scheduler_folder / self.path
        source = file.read_text(encoding="utf-8")
        count = source.count(self.old)
        if count != 1:
            raise MutationDoesNotApply(f"{self.name}: the text is {count} times in scheduler/{self.path}")
        file.write_text(source.replace(self.old, self.new), encoding="utf-8")


BLOCKS = [
    Mutation(
        "blocks are not released when a request is aborted",
        "scheduler.py",
        "            self._kv.release(state, poisoned=reason is FinishReason.ERROR)\n",
        "",
    ),
    Mutation("the null block is in the free list", "block_pool.py", "range(1, num_blocks)", "range(num_blocks)"),
    Mutation("the null block may be released", "block_pool.py", "if not 0 < block_id", "if not 0 <= block_id"),
    Mutation(
        "a free block may be released again",
        "block_pool.py",
        'raise AccountingError(f"block {block_id} is free already")',
        "pass",
    ),
    Mutation(
        "blocks are released twice",
        "kv_cache_manager.py",
        "            self.pool.release(block_id, reuse_soon=block_id not in self.cache)\n",
        "            self.pool.release(block_id, reuse_soon=block_id not in self.cache)\n"
        "            if self.pool.ref_count(block_id):\n"
        "                self.pool.release(block_id, reuse_soon=block_id not in self.cache)\n",
    ),
    Mutation(
        "the null block counts as usable",
        "config.py",
        "(self.num_blocks - 1) * self.block_size",
        "self.num_blocks * self.block_size",
    ),
    Mutation(
        "what a request just started still needs is forgotten in the same round",
        "scheduler.py",
        "            num_owed += self._blocks_owed(state)\n",
        "",
    ),
    Mutation(
        "the last free block is never given",
        "block_pool.py",
        "if num_blocks > len(self._free)",
        "if num_blocks >= len(self._free)",
    ),
    Mutation(
        "an adopted block is not retained",
        "kv_cache_manager.py",
        "        for block_id in blocks:\n            self.pool.retain(block_id)\n",
        "",
    ),
    Mutation(
        "a retained block stays in the free list",
        "block_pool.py",
        "            del self._free[block_id]\n",
        "            pass\n",
    ),
    Mutation(
        "the table is cleared in place under a plan in flight",
        "kv_cache_manager.py",
        "state.block_table = []",
        "state.block_table.clear()",
    ),
    Mutation(
        "a pledge is not given back",
        "kv_cache_manager.py",
        "        self._num_pledged -= self._pledges.pop(state.id, 0)\n",
        "        self._pledges.pop(state.id, 0)\n",
    ),
    Mutation(
        "pledged blocks count as available",
        "kv_cache_manager.py",
        "return self.pool.num_free - self._num_pledged",
        "return self.pool.num_free",
    ),
    Mutation(
        "the owner's pledge does not count for the owner",
        "kv_cache_manager.py",
        "own = min(self._pledges.get(state.id, 0), num_new)",
        "own = 0",
    ),
    Mutation(
        "capacity forgets the pledge",
        "kv_cache_manager.py",
        "        own = self._pledges.get(state.id, 0)\n        return",
        "        own = 0\n        return",
    ),
    Mutation(
        "free cached blocks that are adopted cost nothing",
        "scheduler.py",
        " - len(cached) + self._kv.num_free_among(cached)",
        " - len(cached)",
    ),
    Mutation(
        "admission ignores what running prompts still need",
        "scheduler.py",
        "return needed + num_owed <= self._kv.num_available",
        "return needed <= self._kv.num_available",
    ),
    Mutation(
        "what fits exactly does not fit",
        "scheduler.py",
        "return needed + num_owed <= self._kv.num_available",
        "return needed + num_owed < self._kv.num_available",
    ),
]

PREFIXES = [
    Mutation(
        "blocks are published before they were written",
        "scheduler.py",
        '        assert reserved, "what fits can be reserved"\n',
        "        state.num_computed_tokens += num_tokens\n"
        "        self._kv.publish(state)\n"
        "        state.num_computed_tokens -= num_tokens\n",
    ),
    Mutation(
        "the cache salt is skipped",
        "kv_cache_manager.py",
        "self.cache.root(state.tenant, state.request.cache_salt)",
        'self.cache.root(state.tenant, "")',
    ),
    Mutation(
        "the tenant is skipped",
        "kv_cache_manager.py",
        "self.cache.root(state.tenant, state.request.cache_salt)",
        'self.cache.root("", state.request.cache_salt)',
    ),
    Mutation("the secret seed is skipped", "prefix_cache.py", "parts = (self._seed, ", 'parts = (b"", '),
    Mutation(
        "a hit may cover every token and leaves none to compute",
        "kv_cache_manager.py",
        "self.block_hashes(state, (state.num_tokens - 1) // self.block_size)",
        "self.block_hashes(state, state.num_tokens // self.block_size)",
    ),
    Mutation(
        "a hit trusts the hash and does not compare tokens",
        "prefix_cache.py",
        "if entry.tokens != tokens[start : start + block_size].tobytes():",
        "if False:",
    ),
    Mutation(
        "a hit does not compare the parent",
        "prefix_cache.py",
        "if entry is None or entry.parent != parent or entry.root != root:",
        "if entry is None or entry.root != root:",
    ),
    Mutation(
        "a hit does not compare the root",
        "prefix_cache.py",
        "if entry is None or entry.parent != parent or entry.root != root:",
        "if entry is None or entry.parent != parent:",
    ),
    Mutation(
        "a block is published without its parent",
        "prefix_cache.py",
        "            if parent not in self._by_block:\n                return False\n"
        "            self._by_block[parent].children.add(block_id)\n",
        "            if parent in self._by_block:\n                self._by_block[parent].children.add(block_id)\n",
    ),
    Mutation(
        "the second of two equal blocks takes the place of the first",
        "prefix_cache.py",
        "if block_hash in self._by_hash or block_id in self._by_block:",
        "if block_id in self._by_block:",
    ),
    Mutation(
        "who lost the race goes on publishing",
        "kv_cache_manager.py",
        "            if not state.publishing:\n                break\n",
        "",
    ),
    Mutation(
        "poisoned blocks stay in the cache",
        "kv_cache_manager.py",
        "            if poisoned:\n                self.cache.forget(block_id)\n",
        "",
    ),
    Mutation(
        "descendants of a forgotten block stay in the cache",
        "prefix_cache.py",
        "            pending.extend(self._by_block[child] for child in entry.children)\n",
        "",
    ),
    Mutation(
        "a reused block is not forgotten",
        "kv_cache_manager.py",
        "            self._evicted.extend(self.cache.forget(block_id))\n",
        "            pass\n",
    ),
    Mutation(
        "the most recently used block is evicted",
        "block_pool.py",
        "self._free.popitem(last=False)[0]",
        "self._free.popitem(last=True)[0]",
    ),
    Mutation(
        "the head of a sequence is evicted before its tail",
        "kv_cache_manager.py",
        "for block_id in reversed(state.block_table):",
        "for block_id in state.block_table:",
    ),
    Mutation(
        "equal prompts are computed side by side",
        "prefix_sharing.py",
        "return self._in_flight.last_shared(self._shareable_hashes(state)[num_cached_blocks:])",
        "return None",
    ),
    Mutation(
        "a preempted leader is still waited for",
        "scheduler.py",
        "        self._room.enter_preempted(state)\n        self._room.hand_back(self._in_flight.dissolve(state.id))\n",
        "        self._room.enter_preempted(state)\n",
    ),
    Mutation(
        "an aborted leader is still waited for",
        "scheduler.py",
        "            self._room.hand_back(self._in_flight.dissolve(state.id))\n        else:\n",
        "        else:\n",
    ),
    Mutation(
        "a leader that cannot publish is still waited for",
        "scheduler.py",
        "                if not state.publishing:  # nobody shall wait for blocks that stay private\n"
        "                    self._room.hand_back(self._in_flight.dissolve(state.id))\n",
        "",
    ),
    Mutation(
        "publishing a block wakes nobody",
        "scheduler.py",
        "                    self._room.hand_back(self._in_flight.published(state.id, published))\n",
        "                    pass\n",
    ),
    Mutation(
        "evictions are not reported",
        "scheduler.py",
        "        draft.events.extend(map(BlockEvicted, self._kv.take_evicted()))\n",
        "",
    ),
    Mutation(
        "who is cancelled while set aside is not withdrawn",
        "waiting_room.py",
        "            self._in_flight.withdraw(state.id)\n",
        "            pass\n",
    ),
    Mutation(
        "who was set aside is not handed back",
        "waiting_room.py",
        "        for state in states:\n            self._policy.enqueue(state)\n",
        "        for _ in states:\n            pass\n",
    ),
    Mutation(
        "a scored prompt uses the prefix cache",
        "prefix_sharing.py",
        "return not (state.request.scores_prompt or state.kind is RequestKind.EMBED)",
        "return state.kind is not RequestKind.EMBED",
    ),
    Mutation(
        "an embedding uses the prefix cache",
        "prefix_sharing.py",
        "return not (state.request.scores_prompt or state.kind is RequestKind.EMBED)",
        "return not state.request.scores_prompt",
    ),
    Mutation(
        "the cache is reset under running requests",
        "prefix_cache.py",
        "        if self._pool.num_used:\n            return False\n",
        "",
    ),
]

ORDER = [
    Mutation("the oldest running request may be preempted", "scheduler.py", "in by_age[1:]", "in by_age"),
    Mutation(
        "a request may be preempted for ever",
        "scheduler.py",
        " if state.num_preemptions < self.config.max_preemptions]",
        "]",
    ),
    Mutation(
        "nothing is pledged after the last preemption",
        "scheduler.py",
        "            self._kv.pledge(state, self._blocks_to_start(state) - len(cached))\n",
        "            pass\n",
    ),
    Mutation(
        "the victim under first come first served is the oldest candidate",
        "policies/ordered.py",
        "return max(running, key=self.key)",
        "return min(running, key=self.key)",
    ),
    Mutation(
        "a victim keeps its share of the budget",
        "draft.py",
        "            self.budget += withdrawn.num_tokens\n",
        "            pass\n",
    ),
    Mutation(
        "a victim keeps its slice in the plan",
        "scheduler.py",
        "        draft.withdraw(state)\n",
        "",
    ),
    Mutation(
        "preempted requests do not go first",
        "waiting_room.py",
        "        while self._preempted:\n",
        "        while self._preempted and not self._waiting:\n",
    ),
    Mutation(
        "the youngest preempted request goes first",
        "waiting_room.py",
        "heappush(self._preempted, (state.serial, state))",
        "heappush(self._preempted, (-state.serial, state))",
    ),
    Mutation(
        "there is no ageing bound",
        "waiting_room.py",
        "        if self.is_aged(head):\n            return head\n",
        "",
    ),
    Mutation(
        "ageing begins one overtaking too late",
        "waiting_room.py",
        "return self._num_left >= state.overtake_limit",
        "return self._num_left > state.overtake_limit",
    ),
    Mutation(
        "nobody starts when the policy refuses and nothing runs",
        "waiting_room.py",
        "return head if idle else None",
        "return None",
    ),
    Mutation(
        "seats are filled in a step that preempted",
        "scheduler.py",
        "Blocking.PREEMPTION if preempted else self._fill_seats(draft, now)",
        "self._fill_seats(draft, now)",
    ),
    Mutation(
        "somebody slips past the one that does not fit",
        "scheduler.py",
        "            if not self._fits(state, cached, num_owed):\n                return Blocking.BLOCKS\n",
        "            if not self._fits(state, cached, num_owed):\n"
        "                late = self._room.waiting()[-1:]\n"
        "                if not late or late[0].id in self._in_flight or not self._fits(late[0], [], num_owed):\n"
        "                    return Blocking.BLOCKS\n"
        "                state, cached = late[0], []\n",
    ),
    Mutation(
        "prompts come before decodes",
        "scheduler.py",
        "return state.num_pending_tokens > 1",
        "return state.num_pending_tokens <= 1",
    ),
    Mutation(
        "the token budget is exceeded by one",
        "scheduler.py",
        "draft = StepDraft(self.config.max_num_batched_tokens)",
        "draft = StepDraft(self.config.max_num_batched_tokens + 1)",
    ),
    Mutation(
        "the chunk limit is ignored",
        "scheduler.py",
        "budget, self.config.max_prefill_chunk or budget)",
        "budget)",
    ),
    Mutation(
        "one request more than there are seats",
        "scheduler.py",
        "while draft.budget and len(self._running) < self.config.max_num_seqs:",
        "while draft.budget and len(self._running) <= self.config.max_num_seqs:",
    ),
    Mutation(
        "a policy may grant nothing",
        "scheduler.py",
        "max(1, min(self._policy.grant(state, most), most))",
        "max(0, min(self._policy.grant(state, most), most))",
    ),
    Mutation(
        "a policy may grant more than there is",
        "scheduler.py",
        "max(1, min(self._policy.grant(state, most), most))",
        "max(1, self._policy.grant(state, most))",
    ),
    Mutation(
        "one round sets aside the whole queue",
        "scheduler.py",
        "                if num_set_aside == self.config.max_num_seqs:\n"
        "                    return Blocking.NEXT_STEP\n",
        "",
    ),
]

LIFE = [
    Mutation(
        "deadlines are compared the wrong way",
        "deadlines.py",
        "self._heap[0][0] <= now",
        "self._heap[0][0] > now",
    ),
    Mutation(
        "a deadline strikes only after its moment",
        "deadlines.py",
        "self._heap[0][0] <= now",
        "self._heap[0][0] < now",
    ),
    Mutation(
        "ended requests pile up until their deadlines",
        "deadlines.py",
        "        if len(self._heap) > _MIN_KEPT + 2 * num_live:",
        "        if False:",
    ),
    Mutation(
        "a reservation is not released",
        "scheduler.py",
        "            self._accountant.release(state.reservation)\n",
        "            pass\n",
    ),
    Mutation(
        "the reservation is made before the refusals",
        "scheduler.py",
        "        if self._room.num_waiting >= self.config.max_waiting:\n",
        "        if self._accountant is not None:\n"
        '            self._accountant.reserve("requests", 1)\n'
        "        if self._room.num_waiting >= self.config.max_waiting:\n",
    ),
    Mutation(
        "the queue may hold one more",
        "scheduler.py",
        "if self._room.num_waiting >= self.config.max_waiting:",
        "if self._room.num_waiting > self.config.max_waiting:",
    ),
    Mutation(
        "what can never fit is accepted",
        "scheduler.py",
        "        if request.max_total_tokens > limit:\n            raise RequestTooLargeError",
        "        if request.max_total_tokens > limit + 1:\n            raise RequestTooLargeError",
    ),
    Mutation(
        "a live id is accepted again",
        "scheduler.py",
        "        if request.id in self._states:\n",
        "        if False:\n",
    ),
    Mutation(
        "an ended request is still committed",
        "scheduler.py",
        "            if state is None:\n                continue\n            reason",
        "            if state is None:\n                state = self._states.get(scheduled.request_id)\n"
        "            if state is None:\n                continue\n            reason",
    ),
    Mutation(
        "errors do not poison",
        "scheduler.py",
        "poisoned=reason is FinishReason.ERROR",
        "poisoned=False",
    ),
    Mutation(
        "the limit of output is one token late",
        "outcome.py",
        "if num_output_tokens >= stop.max_tokens:",
        "if num_output_tokens > stop.max_tokens:",
    ),
    Mutation("min_tokens is ignored", "outcome.py", " and num_output_tokens >= stop.min_tokens:", ":"),
    Mutation(
        "stop tokens are ignored",
        "outcome.py",
        "if token_id in stop.stop_token_ids and",
        "if token_id in () and",
    ),
    Mutation(
        "prompt log-probabilities are reported again after a preemption",
        "outcome.py",
        "fresh = max(first, state.num_reported_prompt_logprobs + 1)",
        "fresh = first",
    ),
    Mutation(
        "an interrupted embedding is continued",
        "scheduler.py",
        "        state.embedding = None\n",
        "",
    ),
    Mutation(
        "a cut embedding is handed out",
        "scheduler.py",
        "embedding=state.embedding if reason is FinishReason.STOP else None",
        "embedding=state.embedding",
    ),
    Mutation(
        "a prompt's chunk samples a token",
        "draft.py",
        "samples = request.stop.max_tokens > 0 and start + num_tokens == num_known",
        "samples = request.stop.max_tokens > 0",
    ),
    Mutation(
        "a warm-up samples a token",
        "draft.py",
        "samples = request.stop.max_tokens > 0 and",
        "samples = request.kind is RequestKind.GENERATE and",
    ),
    Mutation(
        "an embedding ends as if it had come to a limit",
        "outcome.py",
        "return FinishReason.STOP if state.kind is RequestKind.EMBED else FinishReason.LENGTH",
        "return FinishReason.LENGTH",
    ),
    Mutation(
        "a resume overwrites the first hit",
        "scheduler.py",
        "        if resumed:\n            draft.events.append(Resumed(state.id))\n",
        "        if resumed:\n            state.num_cached_tokens = state.num_computed_tokens + 1\n"
        "            draft.events.append(Resumed(state.id))\n",
    ),
    Mutation(
        "an illegal move is made all the same",
        "lifecycle.py",
        '        raise IllegalTransitionError(f"{request.status.value} -> {to.value}")\n',
        "        pass\n",
    ),
]

BOOKS = [
    Mutation(
        "the budget may be exceeded by one byte",
        "accountant.py",
        "if num_bytes > self.available_bytes:",
        "if num_bytes > self.available_bytes + 1:",
    ),
    Mutation(
        "the budget may not be used up",
        "accountant.py",
        "if num_bytes > self.available_bytes:",
        "if num_bytes >= self.available_bytes:",
    ),
    Mutation(
        "a reservation may be released twice",
        "accountant.py",
        "self._reservations.pop(reservation_id)",
        "self._reservations[reservation_id]",
    ),
    Mutation(
        "values are forgotten in the price of a token",
        "accountant.py",
        "return 2 * self.num_layers",
        "return self.num_layers",
    ),
    Mutation(
        "the plan forgets the null block",
        "accountant.py",
        "num_min_blocks = -(-min_tokens // layout.block_size) + 1",
        "num_min_blocks = -(-min_tokens // layout.block_size)",
    ),
    Mutation(
        "blocks are rounded down in the price of a request",
        "accountant.py",
        "num_blocks = -(-num_tokens // block_size)",
        "num_blocks = num_tokens // block_size",
    ),
]

WARM_UPS = [
    Mutation(
        "a warm-up ends as if it were complete",
        "outcome.py",
        "return FinishReason.STOP if state.kind is RequestKind.EMBED else FinishReason.LENGTH",
        "return FinishReason.STOP",
    ),
    Mutation(
        "a warm-up ends with the first chunk of its prompt",
        "outcome.py",
        "        if state.num_pending_tokens:\n            return None\n",
        "",
    ),
    Mutation(
        "what ends publishes nothing any more",
        "scheduler.py",
        "            if reason is not FinishReason.ERROR:\n                published",
        "            if reason is None:\n                published",
    ),
]

CENSUS = [
    Mutation(
        "who came after the last step is told what held up others",
        "census.py",
        "return Blocking.NEXT_STEP if state.serial >= first_unseen else blocking",
        "return blocking",
    ),
    Mutation(
        "who is set aside is told that it queues",
        "census.py",
        "    if room.is_set_aside(state):\n        return Blocking.PREFIX\n",
        "",
    ),
    Mutation(
        "who was handed back is told that the policy holds it up",
        "scheduler.py",
        "return Blocking.POLICY if self._room.num_queued else Blocking.NEXT_STEP",
        "return Blocking.POLICY",
    ),
    Mutation(
        "who lacks a seat is told that it lacks tokens",
        "scheduler.py",
        "return Blocking.TOKEN_BUDGET if len(self._running) < self.config.max_num_seqs else Blocking.SEATS",
        "return Blocking.TOKEN_BUDGET",
    ),
    Mutation(
        "who lacks tokens is told that it lacks a seat",
        "scheduler.py",
        "return Blocking.TOKEN_BUDGET if len(self._running) < self.config.max_num_seqs else Blocking.SEATS",
        "return Blocking.SEATS",
    ),
    Mutation("a tenant sees the others' requests", "census.py", "if state.tenant == tenant:", "if True:"),
    Mutation("a census is as long as the queue", "census.py", "if len(entries) < most:", "if True:"),
    Mutation(
        "those that run compute nothing before the others",
        "census.py",
        "num_tokens_ahead += state.num_pending_tokens",
        "num_tokens_ahead += is_waiting * state.num_pending_tokens",
    ),
    Mutation("places are told in order of arrival", "census.py", "queued.sort(key=policy.key)", "pass"),
    Mutation(
        "a place is told where the policy has no order",
        "census.py",
        "        yield state, is_ordered\n",
        "        yield state, True\n",
    ),
    Mutation(
        "who waits for its grammar is not counted",
        "census.py",
        "num_waiting=census.num_waiting + len(own)",
        "num_waiting=census.num_waiting",
    ),
]

NAMED = [*BLOCKS, *PREFIXES, *ORDER, *LIFE, *WARM_UPS, *CENSUS, *BOOKS]
