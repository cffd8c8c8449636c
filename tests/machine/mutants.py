#!/usr/bin/env python3
"""Builds the batcher with one bug at a time and demands that test_batcher_machine finds it.

    tests/machine/mutants.py [--build build/release] [WORD ...]

A mutant is one change of a source below server/: the text as it is, and what stands there instead.
The text must be there once: who changes a source changes its mutants. Prints a table: the promise
that is broken, the bug, and the seed and step at which it was found. Exit status 1 if one was not.
WORDs choose the mutants that have one of them in their names.
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import typing

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ("batcher", "cut", "job")  # that include what is mutated
OTHERS = ("callers", "engine", "model", "model_lock", "simulated", "test_batcher_machine")
SEEDS = 1000
STEPS = 1000


class Mutant(typing.NamedTuple):
    promise: str
    bug: str
    source: str
    old: str
    new: str


def batch(promise, bug, old, new):
    return Mutant(promise, bug, "batch.c", old, new)


def scheduler(promise, bug, old, new):
    return Mutant(promise, bug, "scheduler.c", old, new)


def cut(promise, bug, old, new):
    return Mutant(promise, bug, "cut.c", old, new)


def job(promise, bug, old, new):
    return Mutant(promise, bug, "job.c", old, new)


MUTANTS = [
    # A job has one owner, and nobody else touches it.
    scheduler(
        "one owner",
        "told before the state says so",
        "    job_advance(job, from, JOB_DONE);\n    on_done(job);",
        "    on_done(job);\n    job_advance(job, from, JOB_DONE);",
    ),
    scheduler(
        "one owner",
        "the batch is looked at after its last job was answered",
        "    for (uint32_t i = 0; i < jobs_n; i++) {\n        struct job *job = batch->jobs[i];\n"
        "        job->done_ns = done_ns;",
        "    for (uint32_t i = 0; i < batch->jobs_n; i++) {\n"
        "        struct job *job = batch->jobs[i];\n        job->done_ns = done_ns;",
    ),
    batch(
        "one owner",
        "a job pushed out is looked at after it was told",
        "        on_done(job);\n        job = next;",
        "        on_done(job);\n        (void)next;\n        job = job->next_waiting;",
    ),
    batch(
        "one owner",
        "a job given room is looked at after it was told",
        "        given->on_room(given);\n        given = next;",
        "        given->on_room(given);\n        (void)next;\n        given = given->next_waiting;",
    ),
    cut(
        "one owner",
        "a part is looked at after it was committed",
        "part; part = next) {",
        "part; part = part->next) {",
    ),
    # Each job is answered once.
    scheduler(
        "answered once",
        "a job dropped last is not answered",
        "for (uint32_t i = keep; i < jobs_n; i++)\n        answer_job",
        "for (uint32_t i = keep + 1; i < jobs_n; i++)\n        answer_job",
    ),
    scheduler(
        "answered once",
        "launched jobs are answered as dropped, too",
        "for (uint32_t i = keep; i < jobs_n; i++)\n        answer_job",
        "for (uint32_t i = 0; i < jobs_n; i++)\n        answer_job",
    ),
    scheduler(
        "answered once",
        "those that wait are not answered when the device is lost",
        "        answer_job(job, JOB_WAITING);\n",
        "",
    ),
    scheduler(
        "answered once",
        "dropping overwrites a job that stays",
        "        batch->jobs[i] = batch->jobs[keep];\n",
        "",
    ),
    scheduler("answered once", "sorting overwrites a job", "        jobs[at] = job;\n", ""),
    scheduler(
        "answered once",
        "a failed batch is answered as if it were right",
        "        if (result->status) {\n            job->error",
        "        if (false) {\n            job->error",
    ),
    scheduler(
        "answered once",
        "a lost device goes unseen",
        "    if (batch->result.status == STATUS_UNAVAILABLE)",
        "    if (false)",
    ),
    cut(
        "answered once",
        "a request is not told of its parts",
        "    if (!head)\n        whole->on_room",
        "    if (head)\n        whole->on_room",
    ),
    cut(
        "answered once",
        "a request is told of each part",
        "    if (!head)\n        whole->on_room",
        "    if (true)\n        whole->on_room",
    ),
    # Nobody sleeps while there is work.
    scheduler(
        "no lost wake",
        "a wake reaches nobody who sleeps",
        "    if (was == WAKER_SLEEPING)",
        "    if (false)",
    ),
    scheduler(
        "no lost wake",
        "a borrowed turn leaves the thread as if it were awake",
        "    if (batcher->scheduler_sleeps)\n        batcher->scheduler_wakes_at_ns",
        "    if (false)\n        batcher->scheduler_wakes_at_ns",
    ),
    scheduler(
        "no lost wake",
        "a wake during a borrowed turn is dropped",
        "        bool again = waker_change(waker, WAKER_SET, WAKER_BORROWED);\n"
        "        ASSERT(again);",
        "        bool again = waker_change(waker, WAKER_SET, WAKER_SLEEPING);\n"
        "        ASSERT(again);\n"
        "        return;",
    ),
    scheduler(
        "no lost wake",
        "the thread sleeps though a wake has come",
        "if (waker_change(waker, WAKER_CLEAR, WAKER_SLEEPING))",
        "if (waker_change(waker, WAKER_CLEAR, WAKER_SLEEPING) ||\n"
        "        waker_change(waker, WAKER_SET, WAKER_SLEEPING))",
    ),
    batch(
        "no lost wake",
        "a commit starts nothing",
        "    bool due = batcher_launch_at_ns_locked(batcher) < batcher->scheduler_wakes_at_ns;",
        "    bool due = false;",
    ),
    batch(
        "no lost wake",
        "who abandons wakes nobody",
        "bool wake = batcher_must_wake_locked(batcher); // others may have waited",
        "bool wake = false; // others",
    ),
    batch(
        "no lost wake",
        "a buffer that comes free is given to nobody",
        "        batch_free_locked(batcher, batch);\n        given = give_room_locked(batcher);\n",
        "        batch_free_locked(batcher, batch);\n",
    ),
    batch(
        "no lost wake",
        "who gets room is not told",
        "    pthread_mutex_unlock(&batcher->lock);\n    tell_given(given);\n}\n\n"
        "struct job *batcher_take",
        "    pthread_mutex_unlock(&batcher->lock);\n    (void)given;\n    (void)tell_given;\n}\n\n"
        "struct job *batcher_take",
    ),
    # The right job gets the right rows.
    scheduler(
        "right rows",
        "a segment has another job's operand",
        "            .operand = job->operand,",
        "            .operand = batch->jobs[0]->operand,",
    ),
    batch(
        "right rows",
        "room is given back that others have behind it",
        "    if (job->input + job->input_bytes == (const uint8_t *)batch->input + "
        "batch->input_used)",
        "    if (true)",
    ),
    batch(
        "right rows",
        "outputs share their room",
        "    batch->output_used += room->output_bytes;\n",
        "",
    ),
    batch(
        "right rows",
        "scales lie on the activations",
        "operand->scales = job->input + room->second_offset;",
        "operand->scales = job->input;",
    ),
    batch(
        "right rows",
        "what is staged lies on what is copied",
        "    return staged_end(batch->input, batcher->options.batch_input_bytes, "
        "batch->input_staged);",
        "    return staged_end(batch->input, batch->input_used, 0);",
    ),
    cut(
        "right rows",
        "every part is the first",
        "part_init(cut, part, cut->begun * cut->part_tokens);",
        "part_init(cut, part, 0);",
    ),
    cut(
        "right rows",
        "copied outputs lie on each other",
        "memcpy(cut->copy + output_bytes(cut, part->job.first_token),",
        "memcpy(cut->copy,",
    ),
    cut(
        "right rows",
        "parts do not end with their request",
        "left < cut->part_tokens ? left : cut->part_tokens",
        "cut->part_tokens",
    ),
    job(
        "right rows",
        "a part's rows come from another group",
        "        .from_stride = job->whole->operand.tokens * reduced_dim,",
        "        .from_stride = tokens * reduced_dim,",
    ),
    job(
        "right rows",
        "a part's scales lie as its request's do",
        "        .to_stride = einsum_align4(tokens) * sizeof(uint32_t),",
        "        .to_stride = einsum_align4(job->whole->operand.tokens) * sizeof(uint32_t),",
    ),
    # Nothing is leaked.
    batch(
        "nothing leaked",
        "a released job stays in its batch",
        "    if (batch) // else it was answered while it waited\n        batch->held--;\n",
        "",
    ),
    batch(
        "nothing leaked",
        "a released job is counted on",
        "    batcher->stats.jobs--;\n    if (batch) //",
        "    if (batch) //",
    ),
    batch(
        "nothing leaked",
        "an abandoned batch is not given back",
        "    if (batch->held == 0 && batch->state == BATCH_CLOSED) {",
        "    if (false) {",
    ),
    batch(
        "nothing leaked",
        "abandoned tokens are counted on",
        "    batch->tokens -= job->operand.tokens;\n",
        "",
    ),
    batch(
        "nothing leaked",
        "abandoned room of an empty batch is lost",
        "    if (batch->held == 0) {\n        batch->input_used = batch->output_used = 0;",
        "    if (false) {\n        batch->input_used = batch->output_used = 0;",
    ),
    batch(
        "nothing leaked",
        "bytes of jobs pushed out are counted on",
        "    batcher->waiting_bytes -= bytes;\n",
        "",
    ),
    batch(
        "nothing leaked",
        "bytes of jobs given room are counted on",
        "        batcher->waiting_bytes -= room.waiting_bytes;\n",
        "",
    ),
    batch(
        "nothing leaked",
        "jobs pushed out are counted on",
        "        batcher->stats.queued--;\n        batcher->stats.refused[FULL_GAVE_WAY]++;",
        "        batcher->stats.refused[FULL_GAVE_WAY]++;",
    ),
    batch(
        "nothing leaked",
        "the queue's end hangs on a job that is gone",
        "    batcher->waiting_last = kept_last;\n",
        "    (void)kept_last;\n",
    ),
    scheduler(
        "nothing leaked",
        "a lane is not given back",
        "    if (++batcher->lanes_free == batcher->options.lanes)",
        "    if (batcher->lanes_free == batcher->options.lanes)",
    ),
    scheduler(
        "nothing leaked",
        "tokens that ran are counted on",
        "    batcher->running_tokens -= batch->launch.tokens;\n",
        "",
    ),
    cut(
        "nothing leaked",
        "outputs lent to a reply are not given back",
        "        if (!in_state(&cut->parts[i], JOB_IDLE))\n            batcher_release",
        "        if (false)\n            batcher_release",
    ),
    cut(
        "nothing leaked",
        "a request that needs room keeps finished outputs",
        "    bool needs_room = cut->begun < cut->parts_n || cut->waits;",
        "    bool needs_room = false;",
    ),
    batch(
        "nothing leaked",
        "a share is not given back by who is refused",
        "        *share_end = share_end_before;\n",
        "        (void)share_end_before;\n",
    ),
    # Order: within a connection's class, and high before low.
    batch(
        "order",
        "low before high",
        "priority != other_priority ? priority > other_priority",
        "priority != other_priority ? priority < other_priority",
    ),
    batch(
        "order",
        "priority is nothing",
        "priority != other_priority ? priority > other_priority : share_end",
        "(void)priority, (void)other_priority, share_end",
    ),
    batch(
        "order",
        "newcomers overtake those that wait",
        "    if (batcher->waiting && !job_stands_before(job, batcher->waiting))\n"
        "        return NULL;\n",
        "",
    ),
    batch(
        "order",
        "jobs wait in the order in which they came",
        "    while (*at && !job_stands_before(job, *at))\n"
        "        at = &(*at)->next_waiting;\n    job->next",
        "    while (*at)\n        at = &(*at)->next_waiting;\n    job->next",
    ),
    cut(
        "order", "a part has not its request's class", "    job->priority = whole->priority;\n", ""
    ),
    # Fairness: shares of tokens.
    batch(
        "fairness",
        "who had more goes first",
        ": share_end < other_share_end;",
        ": share_end > other_share_end;",
    ),
    batch(
        "fairness",
        "who was idle has saved up",
        "    job->share_start = *end > batcher->share_now ? *end : batcher->share_now;",
        "    job->share_start = *end;",
    ),
    batch(
        "fairness",
        "a large job counts as a small one",
        "job->share_end = job->share_start + job->operand.tokens;",
        "job->share_end = job->share_start + 1;",
    ),
    batch(
        "fairness",
        "all connections are one",
        "job->connection % CONNECTIONS_TOLD_APART];\n    job->share_start",
        "job->connection * 0];\n    job->share_start",
    ),
    batch(
        "fairness",
        "the shares' now stands still",
        "    if (batch->share_start_last > batcher->share_now)",
        "    if (false)",
    ),
    batch(
        "fairness",
        "batches leave in the order in which they were opened",
        "(!ready || stands_before(batch->priority, batch->share_end,\n"
        "                                                        ready->priority, "
        "ready->share_end))",
        "!ready",
    ),
    batch(
        "fairness",
        "a batch stands where its last job stands",
        "    if (stands_before(job->priority, job->share_end, batch->priority, "
        "batch->share_end)) {",
        "    if (true) {",
    ),
    batch(
        "fairness",
        "the last buffer is anybody's",
        "    if (!keeps_one || free_n != 1)",
        "    if (true)",
    ),
    batch(
        "fairness",
        "who had least gives way",
        "    while (*at && !job_stands_before(job, *at)) {",
        "    while (false) {",
    ),
    batch(
        "fairness",
        "nobody gives way",
        "        place.pushed_out = push_out_locked(batcher, job, room);",
        "        place.pushed_out = NULL, (void)push_out_locked;",
    ),
    # Limits.
    batch(
        "limits",
        "more tokens than a batch may have",
        "room->tokens <= options->batch_tokens_max - batch->tokens &&",
        "room->tokens <= options->batch_tokens_max &&",
    ),
    batch(
        "limits",
        "more input than a batch has",
        "options->batch_input_bytes - batch->input_used - batch->input_staged &&",
        "options->batch_input_bytes - batch->input_staged &&",
    ),
    batch(
        "limits",
        "more output than a batch has",
        "options->batch_output_bytes - batch->output_used - batch->output_staged &&",
        "options->batch_output_bytes &&",
    ),
    batch(
        "limits",
        "more staged input than a batch has",
        "options->batch_input_bytes - batch->input_used - batch->input_staged &&",
        "options->batch_input_bytes - batch->input_used &&",
    ),
    batch(
        "limits",
        "one request more than may queue",
        "    if (batcher->stats.queued >= batcher->options.queue_requests_max ||",
        "    if (batcher->stats.queued > batcher->options.queue_requests_max ||",
    ),
    batch(
        "limits",
        "bytes queue without limit",
        "    return fits ? FULL_NOT : FULL_BYTES;",
        "    return fits ? FULL_NOT : FULL_NOT;",
    ),
    batch(
        "limits",
        "who may wait is refused",
        "    if (!may_wait)\n        return FULL_BUFFERS;",
        "    (void)may_wait;\n    if (options->batches > 2)\n        return FULL_BUFFERS;",
    ),
    batch(
        "limits",
        "who may not wait waits",
        "    if (!may_wait)\n        return FULL_BUFFERS;",
        "    (void)may_wait;",
    ),
    batch(
        "limits", "more batches than lanes", "    return batcher->lanes_free == 0 ||", "    return"
    ),
    batch(
        "limits",
        "a serial engine gets a batch behind a long one",
        "batcher->running_tokens >= SERIAL_TOKENS_MAX",
        "batcher->running_tokens > 100 * SERIAL_TOKENS_MAX",
    ),
    cut("limits", "more parts at once than may be", " || cut->under_way == cut->at_once)", ")"),
    # Buckets, and what leaves when.
    scheduler(
        "buckets",
        "a bucket too small",
        "    while (options->buckets[bucket] < tokens)",
        "    while (options->buckets[bucket] < tokens / 2)",
    ),
    scheduler(
        "buckets",
        "a bucket too large",
        "    return bucket;\n",
        "    return bucket + 1 < options->buckets_n ? bucket + 1 : bucket;\n",
    ),
    scheduler(
        "buckets",
        "requests for a weight do not stand together",
        "    return weight_a != weight_b ? weight_a > weight_b : a->kernel > b->kernel;",
        "    return weight_a == weight_b && a->kernel > b->kernel;",
    ),
    batch(
        "buckets",
        "a batch leaves while it is filled",
        "        if (!batch->filling && (!ready",
        "        if ((!ready",
    ),
    batch(
        "buckets",
        "a batch leaves before its delay",
        "    return delay_ns && !batch->hurried ? batch->first_commit_ns + delay_ns : 0;",
        "    return delay_ns && !batch->hurried ? batch->first_commit_ns + delay_ns / 2 : 0;",
    ),
    batch(
        "buckets",
        "each commit starts the delay anew",
        "    if (batch->jobs_n == 0)\n        batch->first",
        "    if (true)\n        batch->first",
    ),
    # Drops.
    scheduler(
        "drops", "late jobs are launched", "    if (job->deadline_ns <= now)", "    if (false)"
    ),
    scheduler(
        "drops", "cancelled jobs are launched", "    if (job_cancelled(job))", "    if (false)"
    ),
    scheduler(
        "drops",
        "jobs are dropped before their deadline",
        "    if (job->deadline_ns <= now)",
        "    if (job->deadline_ns != UINT64_MAX)",
    ),
    scheduler(
        "drops",
        "jobs are launched on a lost device",
        "    if (device_lost)\n        return error_set",
        "    (void)device_lost;\n    if (false)\n        return error_set",
    ),
]


def link_line(build):
    """The libraries with which the build links the test, as it has them."""
    ninja = (build / "build.ninja").read_text()
    block = ninja[ninja.index("\nbuild tests/test_batcher_machine:") :]
    return re.search(r"LINK_LIBRARIES = (.*)", block)[1].split()


class Runner:
    def __init__(self, build, folder):
        self.build, self.folder = build, folder
        self.compiler = [
            "cc",
            "-std=gnu11",
            "-O1",
            "-D_GNU_SOURCE",
            '-DEINSUMD_VERSION="mutant"',
            "-isystem",
            str(build / "proto"),
            "-w",
        ]
        self.libraries = link_line(build)
        for name in (*SOURCES, *OTHERS):
            self.compile(name, ROOT, folder)
        self.link([folder / f"{name}.o" for name in (*SOURCES, *OTHERS)], folder / "unchanged")

    def compile(self, name, root, to):
        subprocess.run(
            [
                *self.compiler,
                "-I",
                str(root),
                "-I",
                str(ROOT),
                "-c",
                str(ROOT / f"tests/machine/{name}.c"),
                "-o",
                str(to / f"{name}.o"),
            ],
            check=True,
        )

    def link(self, objects, program):
        subprocess.run(
            ["cc", *map(str, objects), "-o", str(program), *self.libraries],
            check=True,
            cwd=self.build,
        )

    def test(self, program):
        """What it says, or None if it finds nothing."""
        result = subprocess.run(
            [program, "--seeds", str(SEEDS), "--steps", str(STEPS)],
            capture_output=True,
            text=True,
            check=False,
        )
        return result.stderr if result.returncode else None

    def run(self, index, mutant):
        folder = self.folder / str(index)
        shutil.copytree(ROOT / "server", folder / "server")
        os.symlink(ROOT / "kernels", folder / "kernels")
        source = folder / "server" / mutant.source
        text = source.read_text()
        if text.count(mutant.old) != 1:
            return f"DOES NOT APPLY: {text.count(mutant.old)} times in server/{mutant.source}"
        source.write_text(text.replace(mutant.old, mutant.new))
        included = {"batch.c": "batcher", "scheduler.c": "batcher", "cut.c": "cut", "job.c": "job"}[
            mutant.source
        ]
        self.compile(included, folder, folder)
        objects = [
            (folder if name == included else self.folder) / f"{name}.o"
            for name in (*SOURCES, *OTHERS)
        ]
        self.link(objects, folder / "mutant")
        said = self.test(folder / "mutant")
        shutil.rmtree(folder)
        if said is None:
            return "SURVIVES"
        where = re.search(r"seed (\d+), step (\d+)", said)
        what = re.sub(r"^\S+?:\d+: ", "", said.splitlines()[0]) if said.strip() else ""
        return (
            f"seed {where[1]}, step {where[2]}: {what}" if where else f"ends without a word: {what}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build/release")
    parser.add_argument("words", nargs="*", metavar="WORD")
    arguments = parser.parse_args()
    mutants = [
        m
        for m in MUTANTS
        if not arguments.words or any(w in m.promise + ": " + m.bug for w in arguments.words)
    ]
    found = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        runner = Runner(arguments.build.resolve(), pathlib.Path(name))
        if said := runner.test(runner.folder / "unchanged"):
            sys.exit(f"without a mutant the test fails: {said}")
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(lambda pair: runner.run(*pair), enumerate(mutants))
            for mutant, result in zip(mutants, results):
                found[mutant.promise] += result.startswith("seed ")
                row = f"| {mutant.promise} | {mutant.source}: {mutant.bug} | {result[:110]} |"
                print(row, flush=True)
    for promise, n in collections.Counter(mutant.promise for mutant in mutants).items():
        verdict = "passed" if found[promise] == n else "FAILED"
        print(f"mutants {promise.replace(' ', '-')}: {verdict}, {found[promise]} of {n} found")
    sys.exit(found.total() < len(mutants))


if __name__ == "__main__":
    main()
