"""Models of other libraries; each library is imported only when its module is used."""
