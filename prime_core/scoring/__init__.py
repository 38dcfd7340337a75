"""How likely a given text or picture is: masked states as rows that share calls, and estimates with their errors."""
