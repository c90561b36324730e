"""Using a model: from a checkpoint to text, token by token.

opened      a home, a run or a checkpoint folder -> weights, tokenizer, output bias
weights     flat weights -> matrices as decoding reads them
cache       keys and values of the last tokens of every sequence
decoder     new tokens of some sequences -> logits of their next ones
sampling    logits -> tokens
text        tokens -> text, with whole characters and stop strings
batch       requests that come and go -> one step after the other
"""
