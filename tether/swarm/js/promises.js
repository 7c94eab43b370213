// Promises (A+) whose jobs run when a call from Python returns. PythonMonkey's own cost 13 microseconds and leak 310 bytes a job;
// esbuild compiles async functions to these.

const { enqueue, report } = require('./bridge')

const PENDING = 0
const FULFILLED = 1
const REJECTED = 2

class Promise {
  constructor (executor) {
    this._state = PENDING
    this._value = undefined
    this._waiting = null
    this._handled = false
    if (executor === undefined) return
    const { resolve, reject } = resolvers(this)
    try {
      executor(resolve, reject)
    } catch (error) {
      reject(error)
    }
  }

  then (onfulfilled, onrejected) {
    const next = new Promise()
    wait(this, { next, onfulfilled, onrejected })
    return next
  }

  catch (onrejected) {
    return this.then(undefined, onrejected)
  }

  finally (work) {
    return this.then(
      value => Promise.resolve(work()).then(() => value),
      error => Promise.resolve(work()).then(() => { throw error })
    )
  }

  static resolve (value) {
    if (value instanceof Promise) return value
    const promise = new Promise()
    resolve(promise, value)
    return promise
  }

  static reject (error) {
    const promise = new Promise()
    settle(promise, REJECTED, error)
    return promise
  }

  static all (values) {
    return new Promise((resolve, reject) => {
      const results = []
      let missing = 1
      const done = () => { if (--missing === 0) resolve(results) }
      for (const value of values) {
        const index = results.push(undefined) - 1
        missing++
        Promise.resolve(value).then(result => { results[index] = result; done() }, reject)
      }
      done()
    })
  }

  static allSettled (values) {
    const outcome = value => Promise.resolve(value).then(
      value => ({ status: 'fulfilled', value }),
      reason => ({ status: 'rejected', reason })
    )
    return Promise.all(Array.from(values, outcome))
  }

  static race (values) {
    return new Promise((resolve, reject) => {
      for (const value of values) Promise.resolve(value).then(resolve, reject)
    })
  }

  static any (values) {
    return new Promise((resolve, reject) => {
      const errors = []
      let missing = 1
      const failed = () => { if (--missing === 0) reject(new AggregateError(errors)) }
      for (const value of values) {
        const index = errors.push(undefined) - 1
        missing++
        Promise.resolve(value).then(resolve, error => { errors[index] = error; failed() })
      }
      failed()
    })
  }

  static withResolvers () {
    const promise = new Promise()
    return { promise, ...resolvers(promise) }
  }

  get [Symbol.toStringTag] () {
    return 'Promise'
  }
}

// Only the first call of either counts.
function resolvers (promise) {
  let called = false
  const once = work => value => {
    if (called) return
    called = true
    work(value)
  }
  return { resolve: once(value => resolve(promise, value)), reject: once(error => settle(promise, REJECTED, error)) }
}

function resolve (promise, value) {
  if (value === promise) return settle(promise, REJECTED, new TypeError('A promise cannot wait for itself'))
  if (value instanceof Promise) return wait(value, { next: promise, onfulfilled: undefined, onrejected: undefined })
  if (value === null || (typeof value !== 'object' && typeof value !== 'function')) return settle(promise, FULFILLED, value)
  adopt(promise, value)
}

function adopt (promise, value) {
  let then
  try {
    then = value.then
  } catch (error) {
    return settle(promise, REJECTED, error)
  }
  if (typeof then !== 'function') return settle(promise, FULFILLED, value)
  const { resolve, reject } = resolvers(promise)
  enqueue(() => {
    try {
      then.call(value, resolve, reject)
    } catch (error) {
      reject(error)
    }
  })
}

function wait (promise, reaction) {
  promise._handled = true
  if (promise._state !== PENDING) return react(promise, reaction)
  if (promise._waiting === null) promise._waiting = [reaction]
  else promise._waiting.push(reaction)
}

function settle (promise, state, value) {
  promise._state = state
  promise._value = value
  const waiting = promise._waiting
  promise._waiting = null
  if (waiting !== null) {
    for (const reaction of waiting) react(promise, reaction)
  } else if (state === REJECTED) {
    // A handler may still be attached in this turn.
    setTimeout(reportUnhandled, 0, promise)
  }
}

function react (promise, { next, onfulfilled, onrejected }) {
  enqueue(() => {
    const handler = promise._state === FULFILLED ? onfulfilled : onrejected
    if (typeof handler !== 'function') return settle(next, promise._state, promise._value)
    let result
    try {
      result = handler(promise._value)
    } catch (error) {
      return settle(next, REJECTED, error)
    }
    resolve(next, result)
  })
}

function reportUnhandled (promise) {
  if (!promise._handled) report(promise._value)
}

module.exports = Promise
