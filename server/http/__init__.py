"""What HTTP asks of every route: connections and their deadlines, keys, bodies, the shape of errors, streams."""
