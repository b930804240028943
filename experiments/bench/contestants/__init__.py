"""One module a contestant: `prepare(case, folder, tokens, options) -> (step, facts)`.

`step()` takes one optimiser step on tokens i32 [b, s] (the labels are the tokens one place on) and returns the loss;
facts: what is known without running it, such as {"temporaries": bytes, "compile": seconds}.
"""
