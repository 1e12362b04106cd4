"""The constellation simulator: satellites that send telemetry over HTTP, and an exact account of what became of it.

It imports nothing of the service: the HTTP format is the contract. Data flows one way:

    traits, orbits -> track -> fleet -> bodies -> load -> sender -> connection -> the service
                     anomalies ^         wire ^   | ^ schedule
                                                  +-> sent_log, report

    parent                       __main__ (flags), control (start, progress, stop, add up), sent_log.merge, report
      sender 0..P-1              one process each; owns a share of the satellites, its connections and its spool

    flags        the command line, checked
    settings     one run as a frozen object; what each sender gets of it
    traits       how satellites differ, and noise: hashes of the seed
    orbits       two-line elements -> positions (SGP4), places on the Earth, the sun
    track        what an orbit does to battery, recorder, signal, temperature
    anomalies    what goes wrong: episodes and spikes
    fleet        (seed, satellite, time) -> readings, vectorised
    wire         readings -> JSON text in cells of fixed width
    bodies       readings -> bodies in each format and encoding, and the head of a request
    schedule     when points are due
    load         the requests that are due
    replay       the same from a file
    connection   one keep-alive connection; what an answer means
    sender       the loop of a sender process
    sent_log     outcome and anomaly of every point: spools, then Parquet
    histogram    latencies as an HdrHistogram
    report       counts, words, JSON
    control      the parent's loop
"""
