"""Measuring candidate tiles and keeping the winners; for users, see the README of `autotune_configs`.

Where to look, from the command line down to the device:

    commands, upkeep, verification     `triton-conv plan, predict, tune, resume`; report, merge, promote; verify
    selection                          which workloads a command works on
    fleet                              several devices at once, each with its share
    tune, rounds                       many workloads within one budget: what is compiled and tried next
    race                               one workload: its trials, its final, its winner
    search, surrogate                  which candidate to try next, by count and by the trials so far
    space                              every tile that may be tried
    cover, likely, seeds               which of them come first: what won elsewhere, what counting speaks for
    modelled                           and what the static model expects of compiled ones
    lab                                the interface behind which candidates are judged, and the device at hand:
    worker, simulated, replay          the same in a process that may be killed, on a made-up device, from a record
    subject, expected, measure         a launch with its operands, what must come out, and its time
    journal, store, portfolio          what is kept: trials, winners, a few tiles for problems that nobody measured
    funnel, allocation                 what is known of candidates with no device
    console, plain                     printing
"""
