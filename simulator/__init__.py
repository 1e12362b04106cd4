"""The constellation simulator: satellites that send telemetry over HTTP, and an exact account of what became of it.

It imports nothing of the service: the HTTP format is the contract. Data flows one way:

    fleet -> wire -> load -> sender -> connection -> the service
                               |
                               +-> sent_log, report

    parent                       __main__ (flags), control (start, progress, stop, add up), sent_log.merge, report
      sender 0..P-1              one process each; owns a share of the satellites, its connections and its spool

    settings     one run as a frozen object; what each sender gets of it
    fleet        (seed, satellite, time) -> readings, vectorised
    wire         readings -> JSON rows of one width
    load         the schedule, and the requests that are due
    connection   one keep-alive connection; what an answer means
    sender       the loop of a sender process
    sent_log     outcome of every point: spools, then Parquet
    report       counts, latencies, words, JSON
    control      the parent's loop
"""
