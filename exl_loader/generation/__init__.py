"""From a request to its text, by what a caller's thread and the model's thread do.

    settings, request     check what is asked for, and make a job
    jobs, evaluations     the requests and their state; `exchange` is what both threads share
    scheduler             what runs in the next step; `drafts` guesses tokens ahead
    passes                what one pass runs
    flight_scheduler      the scheduler of a model over machines, `flights` its passes in flight
    model_thread          the thread that runs the steps
    generator             requests from any thread, and the iterators that callers get
    text_stream           text that may be shown, and stop strings
    rewind, loops         text that is taken back, and text that repeats itself
    text_rules            which tokens are allowed: `healing`, `reasoning`, `grammar`
    sampling              from a row of logits to a token
    forward_model         what generation needs of a model
"""
