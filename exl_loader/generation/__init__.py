"""From a request to its text: jobs, the steps they share, guesses, grammars, streaming."""
