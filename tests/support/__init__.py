"""Tools that the tests share: real servers, made-up content, a server that misbehaves."""
